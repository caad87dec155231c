"""What decodes side by side."""
