"""The live page: its files, the frames that keep it up to date, and rollouts as it shows them."""
