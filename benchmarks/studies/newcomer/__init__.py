"""How long a newcomer takes from an empty environment to a page that shows two versions of a policy."""
