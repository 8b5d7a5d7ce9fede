"""The method from a network and images to a pruned network."""
