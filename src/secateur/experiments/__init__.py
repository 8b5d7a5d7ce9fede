"""Runs on disk: run folders, exported programs, benchmarks, reports."""
