"""What a turn decides: who is admitted, preempted, switched, read and paused."""
