"""Predict what a network costs after a cut, without cutting it.

- `quantities`: one function for each quantity that a budget can limit.
- `macs_and_parameters`: multiply-accumulates and parameters.
- `latency_profiler`: times layers on this machine; `latency_model` predicts latency from that.
- `batch_size`: the memory guard. It picks the largest batch that fits into free memory, which
  `secateur.runtime.memory` measures.

Sizes of tensors and the memory of activations are in `graph.tensor_sizes` and
`graph.activation_memory`.
"""
