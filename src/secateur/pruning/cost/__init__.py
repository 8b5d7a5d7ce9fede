"""Predict what a network costs after a cut, without cutting it.

- `quantities`: one function for each quantity that a budget can limit.
- `macs_and_parameters`: multiply-accumulates and parameters.
- `memory`: peak memory of activations.
- `latency_profiler`: times layers on this machine; `latency_model` predicts latency from that.
- `tensor_sizes`: sizes of many tensors after a cut, in one pass; the others build on it.
- `batch_size`: the memory guard. It picks the largest batch that fits into free memory, which
  `secateur.runtime.memory` measures.
"""
