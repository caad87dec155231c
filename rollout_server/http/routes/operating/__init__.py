"""Routes of whoever runs the server: pauses, what is steered and freed, replicas, and the live page."""
