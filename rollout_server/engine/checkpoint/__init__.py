"""A model directory before it is a module: its files, what config.json means, and whether mlx-lm's code does that."""
