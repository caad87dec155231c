"""An encoder's directory, what its files say of labels and vectors, and reading whole sequences with it in batches."""
