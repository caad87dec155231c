"""What a policy's name means now, and which rows use which version of it."""
