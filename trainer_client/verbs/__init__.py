"""What can be asked of a server: one pure function a verb."""
