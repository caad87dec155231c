"""Commands that look after a running server: its versions and its replicas."""
