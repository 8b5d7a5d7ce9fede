"""Turn filter scores into a smaller network.

- `plan_inputs`: everything a plan needs, measured once: scores, sensitivity, layer times.
- `ranking`: the order in which the channels of each group are removed.
- `sensitivity`: how much the network's output changes when channels of a group are removed.
- `allocation`: how many channels each group keeps, so that a budget is met.
- `plan`: the pruning plan, which lists the filters to remove.
- `size_search`: repeats planning and measuring until latency or accuracy meets its limit.
- `apply`: checks a plan against a network and cuts a copy of it.
- `equivalence`: checks that the cut network equals the original with removed channels masked.
- `outcome`: records of what was done, as they are saved in `result.json`.
- `cost`: MACs, parameters, memory and latency of a network before it is cut.
- `refit`: least-squares estimates of the remaining weights.
"""
