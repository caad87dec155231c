"""What the live page costs: how soon it is there, and what rows lose while somebody looks."""
