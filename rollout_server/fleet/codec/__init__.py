"""The engine's messages as bytes: typed frames that carry values, and never code."""
