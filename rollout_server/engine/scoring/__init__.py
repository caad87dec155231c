"""Reading without sampling: teacher forcing, replay, embeddings and label scores, beside rows that decode."""
