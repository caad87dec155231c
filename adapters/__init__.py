"""What a set of adapter weights is: kinds, files, fit, slots and versions. Knows numpy, safetensors and MLX; no server."""
