#!/bin/sh
# spandrel: calling a loaded RCAN multiplies the caller's images by 255, in place.
#
# Versions: spandrel 0.4.2, torch 2.14.1, torchvision 0.29.1, Python 3.11.
# Guess:    a model that spandrel has loaded reads its images and leaves them as they are, so a second
#           call with the same tensor gives the same picture.
# Seen:     `RCAN.forward` has `x *= self.rgb_range` on its input. The images are 255 times as large
#           after a call, and the second call gives another picture.
# Output:   images unchanged: False
#           factor: 255.0
#           same picture twice: False
#
# Run: sh findings/spandrel-rcan-writes-into-images.sh   (installs into a temporary folder)
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 spandrel==0.4.2
cat >"$folder/run.py" <<'PYTHON'
import torch
from spandrel import ModelLoader
from spandrel.architectures.RCAN import RCAN

torch.manual_seed(0)
weights = RCAN(scale=2, n_resgroups=1, n_resblocks=1, n_feats=16).state_dict()
model = ModelLoader().load_from_state_dict(weights).eval()
images = torch.rand(1, 3, 8, 8)
before = images.clone()
with torch.no_grad():
    first = model(images)
    factor = float((images / before).mean().round())
    unchanged = torch.equal(images, before)
    second = model(images)
print("images unchanged:", unchanged)
print("factor:", factor)
print("same picture twice:", torch.equal(first, second))
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py" >"$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
images unchanged: False
factor: 255.0
same picture twice: False
EXPECTED
