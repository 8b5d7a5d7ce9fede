#!/bin/sh
# torch: an AOTInductor package reads its inputs as the example lay in memory, whatever they are.
#
# Versions: torch 2.14.1, Python 3.11, CPU.
# Guess:    `aoti_load_package` checks the strides of what it is called with, or copies, as the
#           exported program and `torch.compile` do: outputs are those of the network.
# Seen:     outputs are wrong, without an error or a warning, for images in `channels_last` memory
#           after a contiguous example; and for every batch after an example that was expanded
#           (`image.expand(2, …)`), where each image reads as the first one. The exported program
#           itself is right for all of them. (The check is off unless the environment variable
#           AOTI_RUNTIME_CHECK_INPUTS is set.)
# Output:   example contiguous, images contiguous: right
#           example contiguous, images channels_last: wrong
#           example expanded, images contiguous: wrong
#
# Run: sh findings/aotinductor-strides.sh   (installs into a temporary folder; needs a C++ compiler)
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
cat >"$folder/run.py" <<'PYTHON'
import sys

import torch
from torch import nn

torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
images = torch.rand(4, 3, 8, 8)
kinds = {
    "contiguous": images,
    "channels_last": images.contiguous(memory_format=torch.channels_last),
}
examples = {
    "contiguous": torch.rand(2, 3, 8, 8),
    "expanded": torch.rand(1, 3, 8, 8).expand(2, 3, 8, 8),
}
for place, kind in (
    ("contiguous", "contiguous"),
    ("contiguous", "channels_last"),
    ("expanded", "contiguous"),
):
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(network, (examples[place],), dynamic_shapes=shapes)
    path = f"{sys.argv[1]}/{place}-{kind}.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    with torch.no_grad():
        output = torch._inductor.aoti_load_package(path)(kinds[kind])
        output = output[0] if isinstance(output, list | tuple) else output
        expected = network(images)
        assert torch.allclose(program.module()(kinds[kind]), expected, atol=1e-5)
    verdict = "right" if torch.allclose(output, expected, atol=1e-5) else "wrong"
    print(f"example {place}, images {kind}: {verdict}")
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py" "$folder" >"$folder/seen" 2>"$folder/log"
cat "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
example contiguous, images contiguous: right
example contiguous, images channels_last: wrong
example expanded, images contiguous: wrong
EXPECTED
