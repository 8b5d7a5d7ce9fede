"""Accuracy, divergence from the original network, and latency."""
