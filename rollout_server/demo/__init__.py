"""The demo: a model that can add, made to be trained against a real server."""
