"""Benchmarks: many runs from one TOML file.

- `spec`: the benchmark and its jobs.
- `runner`, `worker`: run the jobs in processes, so that an interruption loses at most one.
- `job`, `job_files`: a job's record, and its file.
- `results`: one line per job, for data frames and tables.
- `statistics`: means, and differences with their confidence intervals.
"""
