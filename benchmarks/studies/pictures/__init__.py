"""What a picture costs a tower, and how far its pixels depend on the processor."""
