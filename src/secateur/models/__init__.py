"""Networks by name, their weights, and their evaluation.

- `zoo`: networks by name (built-in, torchvision, timm, user code), and their preprocessing.
- `cifar`: the built-in ResNets and VGG-16 for CIFAR.
- `weights`: weight files, safetensors and PyTorch checkpoints.
- `published`: torchvision's and timm's networks as their published weights want them.
- `state_dict`: load tensors into the network whose `state_dict()` they are from.
- `user_code`, `user_modules`: factories in a user's own file, `path/to/file.py:factory`, which may
  import its neighbours.
- `evaluate`, `score`: accuracy, loss, MACs, parameters and latency.
- `divergence`: how far the outputs of two networks are apart, without labels.
"""
