"""Vision towers: from the pixels of a picture to vectors in the place of its placeholders."""
