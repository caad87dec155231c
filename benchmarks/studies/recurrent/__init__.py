"""What a conversation and many short prompts cost in models whose state cannot be cut."""
