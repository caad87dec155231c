"""Several GPUs of one host: whole copies on each, and one model cut over all of them."""
