"""Runs on disk.

- `run`: prune, fine-tune and report in run folders; resume after an interruption.
- `run_folder`, `manifest`: the files of a run folder, written atomically and checked when read.
- `program`, `program_export`: a network as a list of operations, which runs without its code.
- `onnx_export`: ONNX files, checked against PyTorch's outputs and timed.
- `train_base`: training of a base network, to be pruned later.
- `inspect`, `filter_pictures`: what the filters of a network see, without changing it.
- `demo`: the job of `make demo`.
- `compare`: benchmarks of criteria, with confidence intervals.
- `report`: `report.html` of a run and `benchmark.html` of a benchmark.
"""
