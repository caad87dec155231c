"""What travels: calls, replies, and rows as JSON or arrays."""
