#!/bin/sh
# torch: torch.export(strict=False) fixes the batch size by `len(x)`, and not by `x.shape[0]`.
#
# Versions: torch 2.14.1, Python 3.11.
# Guess:    `len(x)` and `x.shape[0]` are the same number, so both networks are exported with a batch
#           of any size.
# Seen:     with `Dim.AUTO`, that of `x.shape[0]` takes six images after an example of four; that of
#           `len(x)` is exported without a word for exactly four and refuses six. With a named
#           `Dim("batch")`, the second one is not exported at all: constraints are violated. (`len`
#           has to return an int, so tracing can't hand out a symbol; nothing says where it was.)
# Output:   x.shape[0], Dim.AUTO: (6, 6)
#           len(x), Dim.AUTO: AssertionError at the call
#           x.shape[0], Dim('batch'): (6, 6)
#           len(x), Dim('batch'): UserError at the export
#
# Run: sh findings/export-fixes-len.sh   (installs into a temporary folder)
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
cat >"$folder/run.py" <<'PYTHON'
import torch
from torch import nn
from torch.export import Dim, export


class Flat(nn.Module):
    def __init__(self, by_len):
        super().__init__()
        self.by_len = by_len

    def forward(self, x):
        size = len(x) if self.by_len else x.shape[0]
        return x.reshape(size, -1)


for title, size in (("Dim.AUTO", Dim.AUTO), ("Dim('batch')", Dim("batch"))):
    for by_len, name in ((False, "x.shape[0]"), (True, "len(x)")):
        where = "export"
        try:
            example, shapes = (torch.rand(4, 3, 2),), {"x": {0: size}}
            program = export(Flat(by_len), example, dynamic_shapes=shapes, strict=False)
            where = "call"
            seen = str(tuple(program.module()(torch.rand(6, 3, 2)).shape))
        except Exception as error:
            seen = f"{type(error).__name__} at the {where}"
        print(f"{name}, {title}: {seen}")
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py" >"$folder/seen" 2>"$folder/log"
cat "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
x.shape[0], Dim.AUTO: (6, 6)
len(x), Dim.AUTO: AssertionError at the call
x.shape[0], Dim('batch'): (6, 6)
len(x), Dim('batch'): UserError at the export
EXPECTED
