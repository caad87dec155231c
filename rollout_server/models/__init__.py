"""Model files that mlx-lm lacks, or has with faults; they know MLX and mlx-lm only."""
