"""Accuracy, divergence from the original network, and latency.

- `evaluate`: accuracy, loss, MACs and parameters (`Score`)
- `divergence`: how far a network's outputs are from another's, without labels
- `timing`: latency, and the loop that times interleaved actions
"""
