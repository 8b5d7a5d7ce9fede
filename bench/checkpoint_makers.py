"""Save one network in the ways that libraries save networks, for `checkpoints.py`.

Each function saves with one library and yields what it saved. Libraries are imported where they
are used.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import importlib.util
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

NETWORK = '''
from torch import nn


class Small(nn.Module):
    """Two convolutions with batch norm, and a classifier."""

    def __init__(self, num_classes):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, images):
        return self.fc(self.pool(self.features(images)).flatten(1))


def network(num_classes=3):
    return Small(num_classes)


def resnet(num_classes=3):
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return ResNetForImageClassification(config)
'''
"""The file with the network, as a user of `--model file.py:network` has it."""
CLASSES = 3


@dataclass(frozen=True)
class Saved:
    """A file or folder, and what should come of it."""

    library: str
    how: str
    path: Path
    tensors: Mapping[str, Tensor] | None = None
    """The network's state; None if the file is to be refused."""
    refused: str = ""
    """What the refusal says."""
    said: str = ""
    """What is said on loading."""
    key: str | None = None
    """`weights_key`."""
    model: str = "network"
    """The function of the file with the network, or a name for `load_model`."""


Make = Callable[[Path], Iterator[Saved]]


def load_module(folder: Path) -> Any:
    """Write the file with the network, and import it."""
    path = folder / "network.py"
    path.write_text(NETWORK)
    spec = importlib.util.spec_from_file_location("network", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["network"] = module
    spec.loader.exec_module(module)
    return module


def trained(seed: int = 0, name: str = "network") -> nn.Module:
    """Return a network with other statistics than an untrained one has."""
    torch.manual_seed(seed)
    model = cast(nn.Module, getattr(sys.modules["network"], name)())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return model.eval()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a network's state."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def step(model: nn.Module) -> torch.optim.Optimizer:
    """Train a network for one step, and return the optimiser, with its state."""
    optimizer = torch.optim.AdamW(model.parameters())
    images = torch.rand(4, 3, 8, 8)
    nn.functional.cross_entropy(model(images), torch.arange(4) % CLASSES).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def from_torch(folder: Path) -> Iterator[Saved]:
    """State dicts of plain and of wrapped networks."""
    model = trained()
    state = model.state_dict()
    for name, how, content, options in (
        ("plain.pth", "state_dict()", state, {}),
        ("old.pt", "state_dict(), file format before 1.6", state, {"zip": False}),
        ("none", "state_dict(), no suffix", state, {}),
        ("parameters.pth", "dict of parameters and buffers", _live(model), {}),
        ("parallel.pth", "DataParallel", nn.DataParallel(model).state_dict(), {}),
        ("compiled.pth", "torch.compile", torch.compile(model).state_dict(), {}),  # type: ignore[attr-defined]
    ):
        torch.save(
            content,
            folder / name,
            _use_new_zipfile_serialization=options.get("zip", True),
        )
        yield Saved("torch", how, folder / name, state)
    features: Any = model.features
    wraps: dict[str, Any] = {"DataParallel": nn.DataParallel, "torch.compile": torch.compile}
    for name, wrap in wraps.items():
        model.features = wrap(features)
        path = folder / f"inner-{name}.pth"
        torch.save(model.state_dict(), path)
        model.features = features
        yield Saved("torch", f"{name} of a part of the network", path, state)
    average = torch.optim.swa_utils.AveragedModel(nn.DataParallel(model))
    average.update_parameters(nn.DataParallel(model))
    torch.save(average.state_dict(), folder / "averaged.pth")
    yield Saved("torch", "AveragedModel of a DataParallel", folder / "averaged.pth", state)
    torch.save(trained().half().state_dict(), folder / "half.pth")
    half = {name: tensor.half().to(tensor.dtype) for name, tensor in state.items()}
    yield Saved("torch", "float16", folder / "half.pth", half, said="stored as float16")


def _live(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def from_scripts(folder: Path) -> Iterator[Saved]:
    """Checkpoints as training scripts put them together."""
    model = trained()
    optimizer = step(model)
    state, other = state_of(model), trained(1).state_dict()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    settings = {
        "args": argparse.Namespace(lr=0.1, data=Path("photos"), layers=[2, 2]),
        "best": np.float64(88.5),
        "history": collections.defaultdict(list, {"loss": [0.5, np.float32(0.25)]}),
        "when": datetime.datetime(2026, 1, 2),
        "numpy_rng": np.random.get_state(),
        "python_rng": random.getstate(),
        "torch_rng": torch.get_rng_state(),
        "shape": torch.zeros(3, 8, 8).shape,
        "dtype": torch.float32,
        "version": torch.__version__,
    }
    training = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    parallel = nn.DataParallel(model).state_dict()
    for name, how, content, said in (
        ("best.pth.tar", "ImageNet example", {"epoch": 9, "arch": "resnet18"}, ""),
        ("settings.pt", "with settings of all kinds beside the state dict", settings, ""),
    ):
        torch.save({**content, "state_dict": parallel, **training}, folder / name)
        yield Saved("a script", how, folder / name, state, said=said)
    for key in ("weights", "params", "generator"):
        torch.save({key: model.state_dict(), "step": 7}, folder / f"{key}.th")
        yield Saved("a script", f"under the key {key}", folder / f"{key}.th", state, said=repr(key))
    torch.save({**model.state_dict(), "epoch": 3, "lr": 0.1}, folder / "beside.pth")
    yield Saved("a script", "numbers beside the tensors", folder / "beside.pth", state)
    parts = {name: part.state_dict() for name, part in model.named_children()} | training
    torch.save(parts, folder / "parts.pth")
    yield Saved("a script", "a state dict for each part", folder / "parts.pth", state)
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    torch.save(arrays, folder / "arrays.pkl")
    yield Saved("a script", "NumPy arrays", folder / "arrays.pkl", state)
    two = folder / "two.pth"
    torch.save({"student": model.state_dict(), "teacher": other}, two)
    yield Saved("a script", "two networks that fit", two, refused="choose with weights_key")
    yield Saved("a script", "two networks, weights_key=student", two, state, key="student")


def from_torch_refused(folder: Path) -> Iterator[Saved]:
    """What holds code, and formats that are not read."""
    model = trained()
    torch.save(model.state_dict(), folder / "protocol.bin", pickle_protocol=4)
    yield Saved("torch", "pickle protocol 4", folder / "protocol.bin", refused="pickle protocol")
    torch.save(model, folder / "whole.pth")
    yield Saved("torch", "the network itself", folder / "whole.pth", refused="network.Small")
    torch.save({"epoch": 1, "model": model}, folder / "inner.pt")
    yield Saved(
        "torch",
        "the network itself in a dict",
        folder / "inner.pt",
        refused='["model"].state_dict()',
    )
    torch.jit.trace(model, torch.rand(1, 3, 8, 8)).save(folder / "script.pt")
    yield Saved("torch", "TorchScript", folder / "script.pt", refused="TorchScript archive")
    program = torch.export.export(model, (torch.rand(2, 3, 8, 8),))
    torch.export.save(program, folder / "program.pt2")
    yield Saved("torch", "torch.export", folder / "program.pt2", refused="program of torch.export")
    from torch.distributed.checkpoint.state_dict_saver import save

    save({"model": model.state_dict()}, checkpoint_id=folder / "sharded")
    yield Saved("torch", "torch.distributed.checkpoint", folder / "sharded", refused="dcp_to_torch")
    with (folder / "pickled.pkl").open("wb") as file:
        pickle.dump(model.state_dict(), file)
    yield Saved(
        "pickle", "state_dict()", folder / "pickled.pkl", refused="torch.save did not write"
    )


def from_downloads(folder: Path) -> Iterator[Saved]:
    """Files that are not what they seem."""
    torch.save(trained().state_dict(), folder / "whole.pth")
    content = (folder / "whole.pth").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for name, how, body, refused in (
        ("lfs.pth", "Git LFS pointer", pointer, "git lfs pull"),
        ("page.pth", "error page saved as .pth", b"<!DOCTYPE html><html>", "web page"),
        ("empty.ckpt", "empty file", b"", "is empty"),
        ("cut.pth", "download that broke off", content[:-200], "cut short"),
    ):
        (folder / name).write_bytes(body)
        yield Saved("a download", how, folder / name, refused=refused)


def from_reference(folder: Path, references: Path) -> Iterator[Saved]:
    """The checkpoint of torchvision's `references/classification/train.py`, which is run."""
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in range(5):
            (folder / part / str(label)).mkdir(parents=True)
            for number in range(2):
                pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / str(label) / f"{number}.png")
    sizes = ("--train-crop-size", "--val-crop-size", "--val-resize-size")
    command = [sys.executable, "-W", "ignore", "train.py", "--data-path", str(folder)]
    command += ["--model", "resnet18", "--device", "cpu", "--epochs", "1", "-b", "4", "-j", "0"]
    command += ["--output-dir", str(folder), "--model-ema", "--model-ema-decay", "0.9"]
    command += ["--lr-warmup-epochs", "1", *(text for size in sizes for text in (size, "32"))]
    subprocess.run(
        command,
        cwd=references,
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    path = folder / "checkpoint.pth"
    content = torch.load(path, weights_only=False)
    average = {
        name.removeprefix("module."): tensor
        for name, tensor in content["model_ema"].items()
        if name != "n_averaged"
    }
    library, model = "torchvision's reference script", "torchvision:resnet18"
    said = "'model_ema' was loaded"
    yield Saved(library, "--model-ema", path, average, said=said, model=model)
    key = "model"
    yield Saved(library, "--model-ema, weights_key=model", path, content[key], key=key, model=model)


def from_timm(folder: Path) -> Iterator[Saved]:
    """`CheckpointSaver`, with and without an average, and the layout of the Hugging Face Hub."""
    import timm
    from timm.models import save_for_hf
    from timm.utils.checkpoint_saver import CheckpointSaver
    from timm.utils.model_ema import ModelEmaV3

    name = "resnet10t"
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES)
    average = ModelEmaV3(model, decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    average.update(model)
    args = argparse.Namespace(model=name, lr=0.1)
    for kind, ema in (("plain", None), ("ema", average)):
        (folder / kind).mkdir()
        make: Any = CheckpointSaver
        saver = make(model, optimizer, args, model_ema=ema, checkpoint_dir=str(folder / kind))
        saver.save_checkpoint(0, metric=0.5)
        path = folder / kind / "model_best.pth.tar"
        tensors = state_of(model if ema is None else ema.module)
        said = "" if ema is None else "'state_dict_ema' was loaded"
        how = "CheckpointSaver" if ema is None else "CheckpointSaver with ModelEmaV3"
        yield Saved("timm", how, path, tensors, said=said, model=f"timm:{name}")
    save_for_hf(model, str(folder / "hub"), safe_serialization="both")
    how = "save_for_hf, the folder"
    yield Saved("timm", how, folder / "hub", state_of(model), model=f"timm:{name}")
