#!/bin/sh
# torch: `torch.load(path)` reads a file named *.safetensors as one, whatever torch.save put there.
#
# Versions: torch 2.14.1, safetensors 0.8.0, Python 3.11.
# Guess:    torch.load looks at the content, as it does for .pt, .pth and names without a suffix, so
#           what torch.save wrote is read back whatever the file is called.
# Seen:     under a name that ends in .safetensors the file is passed to the safetensors reader, which
#           refuses it. The same file, opened by the caller and passed as a file object, is read.
# Output:   by path: SafetensorError
#           as an open file: {'w': tensor([1., 1.])}
#
# Run: sh findings/torch-load-decides-by-suffix.sh   (installs into a temporary folder)
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 safetensors==0.8.0
cat >"$folder/run.py" <<'PYTHON'
import sys

import torch

path = sys.argv[1]
torch.save({"w": torch.ones(2)}, path)
try:
    print("by path:", torch.load(path, weights_only=True))
except Exception as error:
    print("by path:", type(error).__name__)
with open(path, "rb") as file:
    print("as an open file:", torch.load(file, weights_only=True))
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py" "$folder/weights.safetensors" >"$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
by path: SafetensorError
as an open file: {'w': tensor([1., 1.])}
EXPECTED
