"""Adapters as a trainer has them, and the digest that names them."""
