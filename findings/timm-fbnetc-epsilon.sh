#!/bin/sh
# timm: the published weights of fbnetc_100 need `pretrained=True`, or every output is a little off.
#
# Versions: timm 1.0.31, torch 2.14.1, torchvision 0.29.1, safetensors 0.8.0, Python 3.11.
# Guess:    a network that timm builds by name, with the published file loaded into it by
#           `load_state_dict`, computes what `pretrained=True` computes: the tensors are the same.
# Seen:     it does not. `pretrained=True` also builds the batch norms with another epsilon (0.001,
#           as TensorFlow has it; 1e-05 otherwise), which no state dict holds. Nothing is said. With
#           random weights, outputs differ by about 2 % of the largest one.
# Output:   same tensors: True
#           epsilons: 1e-05 0.001
#           same outputs: False
#
# Run: sh findings/timm-fbnetc-epsilon.sh   (installs into a temporary folder; needs a package index)
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet \
    torch==2.14.1 torchvision==0.29.1 timm==1.0.31 safetensors==0.8.0
cat >"$folder/run.py" <<'PYTHON'
import sys

import timm
import torch
from safetensors.torch import save_file

torch.manual_seed(0)
path = sys.argv[1]
plain = timm.create_model("fbnetc_100", pretrained=False).eval()
save_file(plain.state_dict(), path)  # in place of the published file
overlay = {"file": path, "hf_hub_id": None}
published = timm.create_model("fbnetc_100", pretrained=True, pretrained_cfg_overlay=overlay).eval()
pairs = zip(plain.state_dict().values(), published.state_dict().values(), strict=True)
images = torch.rand(2, 3, 64, 64)
with torch.no_grad():
    outputs = plain(images), published(images)
print("same tensors:", all(torch.equal(*pair) for pair in pairs))
print("epsilons:", plain.bn1.eps, published.bn1.eps)
print("same outputs:", torch.allclose(*outputs, rtol=1e-3))
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py" "$folder/weights.safetensors" >"$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
same tensors: True
epsilons: 1e-05 0.001
same outputs: False
EXPECTED
