"""What reading with a head costs, against a bare forward and transformers; rewards in the call against their parts."""
