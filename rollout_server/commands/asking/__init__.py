"""How commands ask a server: which one, one stream, or many requests at once."""
