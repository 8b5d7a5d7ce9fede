"""Reports: HTML pages and charts of runs and of benchmarks."""
