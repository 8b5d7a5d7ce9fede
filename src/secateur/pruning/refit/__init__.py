"""Re-estimate the remaining weights of a cut network, without labels or gradients.

- `refit_and_check`: refits, then keeps the result only if held-out images don't get worse.
- `layerwise`: goes through the layers in order of execution and refits each one.
- `layers`: a layer in the original and in the cut network; `rows` picks positions of its maps
  and orders the values of kernels.
- `target_layers`: what a layer should output, given the norm and the sum behind it;
  `regression_targets` holds these targets and the place of the offset.
- `patch_regression`, `channel_regression`: the two forms of the regression; `candidates` holds
  what they share.
- `least_squares`: ridge regression from streamed rows, by sums of products or in the dual.
- `activation_cache`: activations between two layers, in memory or in temporary files.
- `batchnorm`: re-estimates batch-norm statistics.
- `significance`: whether a divergence has fallen by more than chance.
"""
