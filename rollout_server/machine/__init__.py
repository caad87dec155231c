"""What this machine can do, and how it does it fastest."""
