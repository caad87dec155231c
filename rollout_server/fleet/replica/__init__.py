"""A replica: an engine, and its end of the link to a controller, which started it or which it joins."""
