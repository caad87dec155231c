"""What a picture costs a tower, and what seeing costs who serves."""
