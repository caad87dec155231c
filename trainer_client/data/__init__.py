"""What a trainer holds: rollouts, batches, versions, and what it computes of them."""
