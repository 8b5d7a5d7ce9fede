"""Other libraries' networks: how they are built, what they take, and how their outputs are read."""
