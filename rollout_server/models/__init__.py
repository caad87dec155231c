"""Model files that mlx-lm lacks; they know MLX and mlx-lm only."""
