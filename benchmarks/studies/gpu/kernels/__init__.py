"""What the device itself does: kernels by their own time."""
