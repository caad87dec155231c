"""What reading with a head costs, against a bare forward and transformers, and rewards in the call against their parts."""
