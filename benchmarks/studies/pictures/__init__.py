"""What a picture costs a tower."""
