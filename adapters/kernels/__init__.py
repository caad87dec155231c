"""Kernels for GPUs: what their text shares for CUDA and Metal, and the one that adds low-rank products."""
