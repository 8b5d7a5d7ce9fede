"""Engines that run a network: PyTorch, its compiler, onnxruntime, OpenVINO. They time networks."""
