"""Least-squares estimates of the remaining weights."""
