"""Benchmarks: many runs from one TOML file, with statistics."""
