"""Load checkpoints that real libraries saved: `python bench/checkpoints.py`.

A small network is saved in every way of `checkpoint_makers.py` and `checkpoint_libraries.py`, then
loaded into a fresh network and compared bit for bit, or refused. The outcome goes to
`results/checkpoints.json` and to the table in docs/reference/checkpoints.md.

It needs libraries that secateur does not depend on (`pip install lightning transformers fastai
ema-pytorch torch-ema thop omegaconf`), and a folder with torchvision's reference script:
`--references vision/references/classification`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import io
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import secateur
from checkpoint_libraries import (
    from_accelerate,
    from_averages,
    from_fastai,
    from_lightning,
    from_others,
    from_transformers,
)
from checkpoint_makers import (
    Make,
    Saved,
    from_downloads,
    from_reference,
    from_scripts,
    from_timm,
    from_torch,
    from_torch_refused,
    load_module,
)
from rows import ROOT
from secateur.runtime.errors import WeightsError
from tables import with_table

RESULTS = ROOT / "results" / "checkpoints.json"
PAGE = ROOT / "docs" / "reference" / "checkpoints.md"
PACKAGES = (
    *("torch", "torchvision", "timm", "lightning", "accelerate", "transformers", "fastai"),
    *("ema-pytorch", "torch-ema", "safetensors", "omegaconf", "thop", "numpy"),
)


def makers(references: Path | None) -> list[Make]:
    """Return the functions that save, by library."""
    every: list[Make] = [from_torch, from_scripts, from_torch_refused, from_timm, from_lightning]
    every += [from_accelerate, from_transformers, from_fastai, from_averages, from_others]
    every += [from_downloads]
    if references is not None:
        every.insert(3, functools.partial(from_reference, references=references.resolve()))
    return every


def check(saved: Saved, folder: Path) -> dict[str, Any]:
    """Load what was saved; return a row with the outcome, and whether it is as it should be."""
    said: list[str] = []
    is_own = ":" not in saved.model
    name = f"{folder / 'network.py'}:{saved.model}" if is_own else saved.model
    classes = 3 if saved.tensors is None else _classes(saved)
    try:
        model = secateur.load_model(
            name, saved.path, num_classes=classes, weights_key=saved.key, notify=said.append
        )
    except WeightsError as error:
        message = str(error).replace(str(folder) + "/", "")
        is_right = bool(saved.refused) and saved.refused in message and "\n" not in message
        return _row(saved, folder, "refused", message, is_right=is_right)
    text = " ".join(said).replace(str(folder) + "/", "")
    is_right = (
        saved.tensors is not None
        and all(
            torch.equal(tensor, saved.tensors[name])
            for name, tensor in model.state_dict().items()
            if not name.endswith("num_batches_tracked")
        )
        and (saved.said in text if saved.said else not said)
    )
    return _row(saved, folder, "loaded", text, is_right=is_right)


def _classes(saved: Saved) -> int:
    assert saved.tensors is not None
    return list(saved.tensors.values())[-1].shape[0]


def _row(
    saved: Saved, folder: Path, outcome: str, message: str, *, is_right: bool
) -> dict[str, Any]:
    return {
        "library": saved.library,
        "how": saved.how,
        "file": saved.path.relative_to(folder).name + ("/" if saved.path.is_dir() else ""),
        "expected": "loaded" if saved.tensors is not None else "refused",
        "outcome": outcome,
        "message": message,
        "is_right": is_right,
    }


def measure(references: Path | None) -> dict[str, Any]:
    """Save, load and compare everything."""
    rows = []
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(action="ignore"):
        folder = Path(name)
        load_module(folder)
        for make in makers(references):
            inner = folder / str(len(list(folder.iterdir())))
            inner.mkdir()
            with contextlib.redirect_stdout(io.StringIO()):
                rows += [check(saved, folder) for saved in make(inner)]
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"versions": versions, "rows": rows}


def table(results: dict[str, Any]) -> str:
    """Return the table of the page."""
    lines = ["| library | saved as | file | outcome |", "|---|---|---|---|"]
    for row in results["rows"]:
        mark = "" if row["is_right"] else " (wrong)"
        lines.append(
            f"| {row['library']} | {row['how']} | `{row['file']}` | {row['outcome']}{mark} |"
        )
    return "\n".join(lines)


def summary(results: dict[str, Any]) -> str:
    """Return how many rows are as they should be, and with which versions."""
    rows = results["rows"]
    right = sum(row["is_right"] for row in rows)
    loaded = sum(row["outcome"] == "loaded" for row in rows)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"{right} of {len(rows)} are as they should be: {loaded} loaded, bit for bit, and "
        f"{len(rows) - loaded} refused with one line. Versions: {versions}."
    )


def page(text: str, results: dict[str, Any]) -> str:
    """Return the page with the current table."""
    text = with_table(text, "summary", summary(results))
    return with_table(text, "checkpoints", table(results))


def main() -> None:
    """Write the results and the page; print the rows that are wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--references", type=Path, help="torchvision's references/classification")
    results = measure(parser.parse_args().references)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if PAGE.is_file():
        PAGE.write_text(page(PAGE.read_text(), results))
    print(summary(results))
    for row in results["rows"]:
        if not row["is_right"]:
            print(row)


if __name__ == "__main__":
    main()
