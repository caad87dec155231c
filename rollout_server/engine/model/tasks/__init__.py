"""What a model is for: its task, and the head that scores in the place of an output over the vocabulary."""
