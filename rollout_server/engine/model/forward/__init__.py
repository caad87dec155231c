"""What a model's forward computes by functions of ours in the place of mlx-lm's."""
