"""Networks by name, their weights, and networks from users' own files."""
