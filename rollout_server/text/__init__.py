"""From ids to text, and what text means; neither HTTP nor MLX."""
