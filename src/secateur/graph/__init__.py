"""The dependency graph: which channels of a network can be cut, which only together, and the cut.

In the order in which `build` uses them:

- `build`: `build_dependency_graph`, the entry point.
- `network_graph`: a traced network as a value; reads operations and their arguments.
- `trace`: traces a network into its ATen operations; exports it with `torch.export`.
- `forward`: networks that run through a function of the user's.
- `outputs`: the logits among what a network returns.
- `torchvision_detectors`: the traceable part of torchvision's detectors.
- `channel_ids`: ids that stand for channels; layers that produce and consume them.
- `propagation`: follows channel ids through the network; records what is coupled and frozen.
- `rules`: how ids pass through each operation; add a rule here to support another operation.
- `groups`: what the result holds: groups of coupled channels, and frozen ones with the reason.
- `coupling`: finds the coupled channels and assembles the dependency graph.
- `dependency`: `DependencyGraph`, with sizes, MACs and parameters after any cut.
- `sizes`: which sizes follow a cut, which attributes of modules must change; freezes the rest.
- `verify`: test cuts, traced again and compared with the prediction.
- `cut`: the cut itself: removes channels from a copy of the network.
- `interpreter`: runs a traced network node by node, with hooks and overrides.
- `patches`: the input patches of a convolution at chosen positions.
- `taps`: where feature maps are read, and the weights around each place.
- `kept_channels`, `input_edit`, `finite`: parts of values after a cut, reconstructed inputs, the
  check for NaN and Inf.
- `tensor_sizes`, `activation_memory`: sizes of many tensors, and the memory of a forward pass.
- `layer_calls`: operations of layers on tensors of any width, to be timed.
- `module_state`: reads a module without changing it.
"""
