"""What is answered: JSON entries, files of arrays, and streams."""
