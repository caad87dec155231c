"""What a fleet costs: one replica against the engine in the process, pushes, the controller's work, memory."""
