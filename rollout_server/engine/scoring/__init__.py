"""Reading without sampling: teacher forcing, replay and embeddings, beside rows that decode."""
