"""Recurrent language models with mlx-lm's interface; parameters have the names of their files."""
