"""A small run on real files, for benches and tests that disturb it; and a disk that fails."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from PIL import Image
from torch import nn

from secateur.config import RunConfig, from_dict, to_toml
from secateur.experiments import run as runs
from secateur.experiments.compare.runner import run_benchmark
from secateur.experiments.compare.spec import BenchmarkSpec
from secateur.experiments.report.benchmark import ROWS, write_benchmark
from secateur.pipeline.result import read_result

MODEL = '''
import torch.nn as nn


def small(num_classes=10):
    """Two layers that can be cut, a residual sum, batch norms."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
            self.conv1 = nn.Conv2d(8, 12, 3, 1, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(12)
            self.conv2 = nn.Conv2d(12, 8, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(8)
            self.conv3 = nn.Conv2d(8, 16, 3, 2, 1)
            self.head = nn.Linear(16, num_classes)

        def forward(self, x):
            x = self.stem(x).relu()
            x = (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()
            return self.head(self.conv3(x).relu().mean((2, 3)))

    return Small()
'''
CLASSES = ("disc", "stripes", "noise")
SIDE = 16
VARYING = frozenset({"seconds", "latency_ms", "latency_batch", "latency_left", "command"})
"""Keys of a result that differ from run to run."""


@dataclass(frozen=True)
class Case:
    """The folder with the files of a small run."""

    folder: Path
    checkpoint_minutes: float = 1e-4
    """Between two checkpoints of the training, but for those at the end of an epoch."""
    report_images: int = 12
    """Calibration images that the report looks at filters with."""

    @property
    def _training(self) -> dict[str, Any]:
        return {
            "batch_size": 16,
            "workers": 0,
            "warmup_steps": 0,
            "checkpoint_minutes": self.checkpoint_minutes,
        }

    @property
    def model_name(self) -> str:
        """As `models.load` takes it."""
        return f"{self.folder / 'own.py'}:small"

    @property
    def source(self) -> str:
        """As `data.load` takes it."""
        return f"folder:{self.folder / 'images'}"

    def write(self) -> None:
        """Write images of three classes as PNG files, and the network's code."""
        generator = np.random.default_rng(0)
        for part, count in (("train", 24), ("test", 8)):
            for name in CLASSES:
                folder = self.folder / "images" / part / name
                folder.mkdir(parents=True)
                for number in range(count):
                    pixels = _picture(name, generator)
                    Image.fromarray(pixels).save(folder / f"{number}.png")
        (self.folder / "own.py").write_text(MODEL)

    def config(self, *, epochs: int = 2) -> RunConfig:
        """Return a run of all steps that takes a second."""
        return from_dict(
            {
                "model": {"name": self.model_name, "allow_untrained": True},
                "data": {
                    "source": self.source,
                    "image_size": SIDE,
                    "calibration_images": 24,
                    "batch_size": 12,
                },
                "plan": {"target": "macs=0.6"},
                "finetune": {"epochs": epochs, **self._training},
                "report": {"images": self.report_images},
            },
            RunConfig,
        )

    def benchmark(self) -> BenchmarkSpec:
        """Return a benchmark of four jobs."""
        return from_dict(
            {
                "criteria": ["vote", "l1"],
                "targets": ["macs=0.8", "macs=0.6"],
                "networks": [{"name": self.model_name, "label": "small", "allow_untrained": True}],
                "data": {"source": self.source, "image_size": SIDE, "calibration_images": 24},
                "finetune": {"epochs": 1, **self._training},
            },
            BenchmarkSpec,
        )

    def command(self, job: str, out: Path) -> list[str]:
        """Return the command line that does what `prune`, `finetune` or `compare` do."""
        folder = self.folder
        if job == "compare":
            content = self.benchmark().model_dump(mode="json", exclude_unset=True)
            (folder / "benchmark.toml").write_text(tomli_w.dumps(content))
            return ["compare", str(folder / "benchmark.toml"), "-o", str(out), "-j", "2"]
        if job == "finetune":
            options = ["--epochs", "3", "--learning-rate", "0.01", "--resume"]
            return ["finetune", str(out), "--model", self.model_name, *options]
        (folder / "config.toml").write_text(to_toml(self.config()))
        return ["prune", "-c", str(folder / "config.toml"), "-o", str(out), "--resume"]

    def prune(self, out: Path) -> None:
        """Prune and fine-tune, resuming from what is in the folder."""
        runs.run(self.config(), out, resume=True)

    def finetune(self, out: Path) -> None:
        """Fine-tune in a folder that holds a run."""
        changes = {"epochs": 3, "learning_rate": 0.01}
        runs.finetune(out, out, changes, named={"model.name": self.model_name}, resume=True)

    def compare(self, out: Path) -> None:
        """Run the jobs that a benchmark's folder lacks, and write its tables."""
        spec = self.benchmark()
        write_benchmark(out, spec, run_benchmark(spec, out, workers=2))


def _picture(name: str, generator: np.random.Generator) -> np.ndarray:
    """`[SIDE, SIDE, rgb]`."""
    pixels = generator.integers(0, 90, (SIDE, SIDE, 3), dtype=np.uint8)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    if name == "disc":
        row, column = generator.integers(5, 11, 2)
        pixels[(rows - row) ** 2 + (columns - column) ** 2 < 18] += 160
    elif name == "stripes":
        pixels[(rows + generator.integers(4)) % 4 < 2] += 160
    return pixels


def outcome(folder: Path) -> dict[str, Any]:
    """Return the results in the folder of a run or a benchmark, without what varies by run."""
    if (folder / ROWS).is_file():
        rows = [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]
        return {"rows": [_constant(row) for row in rows]}
    result = read_result(folder)
    weights = (folder / "model.safetensors").read_bytes()
    return {"result": _constant(result.model_dump(mode="json")), "weights": weights.hex()}


def differences(actual: Any, expected: Any, place: str = "") -> list[str]:
    """Return where two outcomes differ."""
    if isinstance(actual, dict) and isinstance(expected, dict):
        keys = sorted(actual.keys() | expected.keys())
        pairs = [(f"{place}.{key}", actual.get(key), expected.get(key)) for key in keys]
    elif isinstance(actual, list) and isinstance(expected, list) and len(actual) == len(expected):
        both = zip(actual, expected, strict=True)
        pairs = [(f"{place}.{number}", *pair) for number, pair in enumerate(both)]
    else:
        return [] if actual == expected else [f"{place}: {str(actual)[:40]}, {str(expected)[:40]}"]
    return [line for name, a, b in pairs for line in differences(a, b, name)]


def _constant(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _constant(item) for key, item in value.items() if key not in VARYING}
    return [_constant(item) for item in value] if isinstance(value, list) else value


class FailingDisk:
    """Counts what is written below a folder, and fails at one of the operations."""

    def __init__(self, root: Path, fails_at: int | None = None, number: int = errno.ENOSPC) -> None:
        self.count = 0
        self._root, self._fails_at, self._number = str(root), fails_at, number
        self._descriptors: set[int] = set()

    @contextlib.contextmanager
    def mounted(self) -> Iterator[FailingDisk]:
        """Within the block the functions of `os` that change a disk are those of this one."""
        names = ("open", "write", "fsync", "replace", "rename", "mkdir")
        before = {name: getattr(os, name) for name in names}
        changed = {
            "open": self._open(os.open),
            "write": self._write(os.write),
            "fsync": self._with_descriptor(os.fsync),
            "replace": self._with_path(os.replace),
            "rename": self._with_path(os.rename),
            "mkdir": self._with_path(os.mkdir),
        }
        for name, function in changed.items():
            setattr(os, name, function)
        try:
            yield self
        finally:
            for name, function in before.items():
                setattr(os, name, function)

    def _is_here(self, path: object) -> bool:
        return isinstance(path, str | Path) and str(path).startswith(self._root)

    def _is_to_fail(self) -> bool:
        self.count += 1
        # A disk that is full stays full.
        return self._fails_at is not None and self.count >= self._fails_at

    def _error(self, *path: str) -> OSError:
        return OSError(self._number, os.strerror(self._number), *path)

    def _open(self, function: Callable[..., int]) -> Callable[..., int]:
        def opened(path: Any, flags: int, *rest: Any, **options: Any) -> int:
            is_new = bool(flags & os.O_CREAT) and self._is_here(path)
            if is_new and self._is_to_fail():
                raise self._error(str(path))
            descriptor = function(path, flags, *rest, **options)
            self._descriptors.discard(descriptor)
            if is_new:
                self._descriptors.add(descriptor)
            return descriptor

        return opened

    def _write(self, function: Callable[..., int]) -> Callable[..., int]:
        def written(descriptor: int, content: Any) -> int:
            if descriptor in self._descriptors and self._is_to_fail():
                function(descriptor, memoryview(content)[: len(content) // 2])
                raise self._error()
            return function(descriptor, content)

        return written

    def _with_descriptor(self, function: Callable[..., None]) -> Callable[..., None]:
        def flushed(descriptor: int) -> None:
            if descriptor in self._descriptors and self._is_to_fail():
                raise self._error()
            function(descriptor)

        return flushed

    def _with_path(self, function: Callable[..., None]) -> Callable[..., None]:
        def changed(path: Any, *rest: Any, **options: Any) -> None:
            if self._is_here(path) and self._is_to_fail():
                raise self._error(str(path))
            function(path, *rest, **options)

        return changed


def renewed(folder: Path, content: Path | None = None) -> Path:
    """Return the folder, emptied or replaced by a copy of another one."""
    shutil.rmtree(folder, ignore_errors=True)
    if content is not None:
        shutil.copytree(content, folder)
    return folder


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return the global state of the process, and what a run could leave on a network."""
    hooks = [
        len(getattr(module, name))
        for module in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    ]
    return {
        "seed": torch.random.get_rng_state().tolist(),
        "python_seed": hash(random.getstate()),
        "dtype": str(torch.get_default_dtype()),
        "precision": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "warnings": len(warnings.filters),
        "hooks": hooks,
        "modes": [module.training for module in model.modules()],
        "needs_gradient": [parameter.requires_grad for parameter in model.parameters()],
        "gradient": [parameter.grad is None for parameter in model.parameters()],
    }
