"""What being looked at costs: the live page, the metrics and the log."""
