"""Connect to other libraries: ONNX, Torch-Pruning, experiment trackers."""
