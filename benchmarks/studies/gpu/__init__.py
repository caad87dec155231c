"""Figures of a GPU, on random models of Qwen3's shapes: parts that run by themselves, each with one question."""
