"""One thread owns the model. Frozen commands come in through one queue, plain Python values go out."""
