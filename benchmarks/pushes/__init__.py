"""What a push costs a server that decodes."""
