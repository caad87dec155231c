"""What reading with a head costs, against a bare forward and against transformers."""
