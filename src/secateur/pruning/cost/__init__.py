"""What a network of given widths costs: MACs, parameters, memory, latency."""
