"""Every input in docs/reference/errors.md leads to the message beside it, word for word."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import secateur
from fault_case import Case, FailingDisk
from hub_server import TOKEN, Repository, mock_hub
from layouts import Pixels, random_pixels, tiff_of, write_classes, write_image
from secateur import data
from secateur.cli import app
from secateur.config import BaseConfig, read_config
from secateur.data.preprocessing import Preprocessing
from secateur.experiments import run as runs
from secateur.experiments import run_folder
from secateur.experiments.manifest import MANIFEST, PLAN, PROGRAM, WEIGHTS
from secateur.experiments.push import push
from secateur.experiments.train_base import train_base
from secateur.models import zoo
from secateur.models.checkpoint_files import read_checkpoint
from secateur.runtime import safetensors_io
from secateur.runtime.atomic_io import make_inner_folder, replace_file
from secateur.runtime.errors import SecateurError
from secateur.runtime.file_lock import lock_folder
from secateur.scoring.concepts import annotated_images
from secateur.training import memory_check

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "errors.md"
COLUMNS = ("what is wrong", "message", "what to do")
ANY = "…"
"""Stands in a message for what differs."""


@dataclass(frozen=True)
class Row:
    """A line of a table of the page."""

    wrong: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return self.wrong

    @property
    def pattern(self) -> str:
        """What the message must match as a whole."""
        return ".+".join(map(re.escape, self.message.split(ANY)))


def rows() -> list[Row]:
    """All lines of the page's tables, whose code is between one backquote or two."""
    rows = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|") or cells == [*COLUMNS] or set(line) <= set("|-"):
            continue
        wrong, code, remedy = cells
        quoted = re.fullmatch(r"(`+) ?(.+?) ?\1", code)
        assert quoted, line
        rows.append(Row(wrong, quoted[2], remedy))
    return rows


ROWS = rows()


@dataclass(frozen=True)
class Desk:
    """What a case has to work with."""

    folder: Path
    """Empty."""
    files: Case
    """Images of three classes, and a network's code; not to be changed."""
    whole: Path
    """A run folder of those; not to be changed."""

    def write(self, name: str, content: str | bytes) -> Path:
        """A file in the folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def user_code(self, text: str) -> str:
        """The name of a network that a file of such a text makes."""
        return f"{self.write('net.py', text)}:small"

    def run(self) -> Path:
        """A run folder that may be changed."""
        return Path(shutil.copytree(self.whole, self.folder / "run", dirs_exist_ok=True))

    def prune(self, *options: object) -> None:
        """`secateur prune` of the network on the images, so far as it comes."""
        common = ("-m", self.files.model_name, "--allow-untrained", "-d", self.files.source)
        secateur_command("prune", *common, "-o", self.folder / "run", *options)


def secateur_command(*arguments: object) -> None:
    """Runs the command line in this process."""
    with mock.patch.object(sys, "argv", ["secateur", *map(str, arguments)]):
        app.main()


def message_of(case: Callable[[Desk], object], desk: Desk) -> str:
    """What a user reads: the text of the error, or what the command line prints after `error:`."""
    said = io.StringIO()
    with (
        contextlib.redirect_stderr(said),
        pytest.raises((SecateurError, SystemExit)) as raised,
    ):
        case(desk)
    error = raised.value
    if isinstance(error, SystemExit):
        assert error.code in (1, 2)
        last = said.getvalue().splitlines()[-1]  # after the lines of the stages that have ended
        start, _, message = last.partition(" ")
        assert start == "error:"
        return message
    return str(error)


# --- the request -------------------------------------------------------------------------------


def missing_extra(desk: Desk) -> None:
    with mock.patch.dict(sys.modules, {"timm": None}):
        zoo.load("timm:resnet18")


def network() -> nn.Module:
    """Three layers, of which two can be cut, for images of 8×8."""
    model = nn.Sequential()
    for number, (read, written) in enumerate(((3, 8), (8, 8), (8, 4)), 1):
        model.add_module(f"conv{number}", nn.Conv2d(read, written, 3, padding=1))
        model.add_module(f"relu{number}", nn.ReLU())
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flat", nn.Flatten())
    return model


def images(count: int = 60) -> Tensor:
    return torch.rand(count, 3, 8, 8)


class ByName(nn.Module):
    """Returns a dict of two tensors, of which neither is called logits."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"a": self.network(images), "b": images.mean((2, 3))}


class Beside(nn.Module):
    """Takes an image, and a row of features beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.features = network(), nn.Linear(5, 4)

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        output: Tensor = self.network(image) + self.features(features)
        return output


def colours(shift: int) -> list[tuple[Tensor, Tensor]]:
    """Images of three colours, with labels that are so many numbers from the colour's."""
    numbers = torch.arange(120) % 3
    return [(images(120) * 0.1 + torch.eye(3)[numbers][:, :, None, None], (numbers + shift) % 3)]


def colour_network() -> nn.Module:
    """Its logits are the colours of an image."""
    convolution = nn.Conv2d(3, 3, 1, bias=False)
    with torch.no_grad():
        convolution.weight.copy_(torch.eye(3)[:, :, None, None])
    return nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def one_output() -> nn.Module:
    return nn.Sequential(network(), nn.Linear(4, 1))


def prune_strictly(model: nn.Module, batches: Any) -> None:
    """Prunes as if the network had been trained."""
    secateur.prune(model, batches, settings={"model.allow_untrained": False})


class Twice(nn.Module):
    """Returns its output twice."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.body(images)
        return outputs, outputs


def halves(model: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = model(images)[0]
    return logits


def made_with_forward(desk: Desk) -> None:
    model = Twice(network())
    secateur.prune(model, images(), forward=halves).save(desk.folder / "run")
    secateur.load(desk.folder / "run", architecture=model)


def large_config(desk: Desk) -> None:
    path = desk.folder / "run.toml"
    with path.open("wb") as file:
        file.truncate(2**21)
    read_config(path)


# --- networks ----------------------------------------------------------------------------------


class Branching(nn.Module):
    """Decides by what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y.mean((2, 3)) if y.sum() > 0 else y.amax((2, 3))


class WithoutGradients(nn.Module):
    """Switches gradients off for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.conv(x).relu().mean((2, 3)))
        return logits


def scripted() -> nn.Module:
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.script(Branching())


def quantised() -> nn.Module:
    supported = torch.backends.quantized.supported_engines
    torch.backends.quantized.engine = "qnnpack" if "qnnpack" in supported else "fbgemm"
    with warnings.catch_warnings(action="ignore"):
        model: nn.Module = torch.ao.quantization.quantize_dynamic(
            WithoutGradients(), {nn.Linear}, dtype=torch.qint8
        )
    return model


def labelled_by(labels: Tensor) -> None:
    secateur.prune(network(), [(images(), labels)])


def labelled(model: Any, **options: Any) -> None:
    secateur.prune(
        model,
        [(images(), torch.arange(60) % 4)],
        settings={"model.allow_untrained": True},
        **options,
    )


# --- weights -----------------------------------------------------------------------------------


class Payload:
    """What would make a file when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (Path("ran"),)


def pickled(desk: Desk) -> None:
    path = desk.folder / "weights.pth"
    torch.save({"weight": Payload()}, path)
    read_checkpoint(path)


def whole_network(desk: Desk) -> None:
    path = desk.folder / "weights.pth"
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3)), path)
    read_checkpoint(path)


def state(desk: Desk, seed: int = 0) -> dict[str, Tensor]:
    return dict(zoo.load(desk.files.model_name, num_classes=3, seed=seed).state_dict())


def loaded_from(desk: Desk, content: object, *, key: str | None = None) -> None:
    path = desk.folder / "weights.pth"
    torch.save(content, path)
    zoo.load(desk.files.model_name, path, num_classes=3, weights_key=key)


def cut_zip(desk: Desk) -> None:
    path = desk.folder / "weights.pth"
    torch.save({"weight": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    read_checkpoint(path)


def missing_shard(desk: Desk) -> None:
    shards = {"weight_map": {"weight": "model-00002-of-00002.safetensors"}}
    desk.write("model.safetensors.index.json", json.dumps(shards))
    read_checkpoint(desk.folder)


def several_files(desk: Desk) -> None:
    for name in ("epoch1.pth", "epoch2.pth"):
        desk.write(name, b"")
    read_checkpoint(desk.folder)


def other_folder(desk: Desk) -> None:
    for name in (".metadata", "__0_0.distcp"):
        desk.write(name, b"")
    read_checkpoint(desk.folder)


def large_header(desk: Desk) -> None:
    path = desk.write("weights.safetensors", struct.pack("<Q", 10**9))
    read_checkpoint(path)


def flipped_value(desk: Desk) -> None:
    content = bytearray(safetensors_io.to_bytes({"weight": torch.ones(100)}))
    content[-50] ^= 1
    read_checkpoint(desk.write("weights.safetensors", bytes(content)))


def flipped_in_zip(desk: Desk) -> None:
    path = desk.folder / "weights.pth"
    torch.save({"weight": torch.ones(100)}, path)
    content = bytearray(path.read_bytes())
    content[content.find(struct.pack("<ff", 1.0, 1.0)) + 50] ^= 1
    path.write_bytes(content)
    read_checkpoint(path)


def other_weights(desk: Desk) -> None:
    path = desk.folder / "weights.safetensors"
    save_file({"stem.weight": torch.zeros(1)}, path)
    zoo.load(desk.files.model_name, path, num_classes=3)


def other_classes(desk: Desk) -> None:
    path = desk.folder / "weights.safetensors"
    save_file(zoo.load(desk.files.model_name, num_classes=10).state_dict(), path)
    zoo.load(desk.files.model_name, path, num_classes=3)


def not_finite(desk: Desk) -> None:
    model = network()
    model.get_parameter("conv2.bias").data[1] = float("nan")
    labelled(model)


FIXED_SIZE = "nn.Conv2d(3, 4, 3, 4, 1), nn.Flatten(), nn.Linear(256, 3)"
LARGE_KERNEL = "nn.Conv2d(3, 4, 21), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)"
FOUR_CHANNELS = "nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)"


def fit(desk: Desk, layers: str, *options: object) -> None:
    """`secateur evaluate` of a network of such layers, on images that are not square."""
    text = f"from torch import nn\ndef small():\n    return nn.Sequential({layers})\n"
    name = desk.user_code(text)
    secateur_command("evaluate", "-m", name, "-d", desk.files.source, *options)


# --- run folders -------------------------------------------------------------------------------


def changed(desk: Desk, name: str, change: Callable[[str], str]) -> Path:
    """A run folder with a file of another text."""
    run = desk.run()
    (run / name).write_text(change((run / name).read_text()))
    return run


def agreeing(run: Path) -> Path:
    """The run folder with a manifest that says what its files are now."""
    manifest = json.loads((run / MANIFEST).read_text())
    for name in manifest["files"]:
        manifest["files"][name] = hashlib.sha256((run / name).read_bytes()).hexdigest()
    (run / MANIFEST).write_text(json.dumps(manifest))
    return run


def load_run(run: Path, desk: Desk, classes: int = 3) -> None:
    run_folder.load(run, architecture=zoo.load(desk.files.model_name, num_classes=classes))


def not_empty(desk: Desk) -> None:
    desk.write("run/notes.txt", "mine")
    desk.prune()


def something_else(desk: Desk) -> None:
    desk.write("run/notes.txt", "mine")
    desk.prune("--overwrite")


def listed_outside(desk: Desk) -> None:
    run = desk.run()
    manifest = json.loads((run / MANIFEST).read_text())
    manifest["files"]["../../x"] = "0" * 64
    (run / MANIFEST).write_text(json.dumps(manifest))
    run_folder.load_program(run)


def missing_member(desk: Desk) -> None:
    run = desk.run()
    (run / WEIGHTS).unlink()
    run_folder.load_program(run)


def unknown_call(desk: Desk) -> None:
    run = changed(desk, PROGRAM, lambda text: text.replace("aten.relu", "os.system"))
    run_folder.load_program(agreeing(run))


def weights_of_another(desk: Desk) -> None:
    run = desk.run()
    state = zoo.load(desk.files.model_name, num_classes=3).state_dict()
    (run / WEIGHTS).write_bytes(safetensors_io.to_bytes(state))
    load_run(agreeing(run), desk)


def made_from_other_weights(desk: Desk) -> None:
    code = (desk.files.folder / "own.py").read_text()
    name = desk.user_code(f"import torch\ntorch.manual_seed(5)\n{code}")
    run = desk.run()
    runs.finetune(run, run, {"epochs": 1}, named={"model.name": name})


def two_at_once(desk: Desk) -> None:
    with lock_folder(desk.folder / "run"):
        desk.prune()


def mounted(desk: Desk) -> None:
    with mock.patch("os.path.ismount", lambda path: path == os.path.realpath(desk.folder / "run")):
        desk.prune()


def base_in_run(desk: Desk) -> None:
    config = desk.files.config(epochs=0)
    train_base(BaseConfig(model=config.model, data=config.data), desk.run(), resume=True)


def resumed_otherwise(desk: Desk) -> None:
    config = desk.files.config(epochs=0)
    plan = config.plan.model_copy(update={"target": "macs=0.8"})
    runs.run(config.model_copy(update={"plan": plan}), desk.run(), resume=True)


# --- data sets ---------------------------------------------------------------------------------


def folder_of(desk: Desk, *names: str) -> str:
    """A folder of small images, one at each of the places."""
    for name, pixels in zip(names, random_pixels(len(names), 8, 8, 3), strict=True):
        write_image(desk.folder / name, pixels)
    return f"folder:{desk.folder}"


PARTS, CLASSES = ("train", "test"), ("ant", "bee")


def unsorted_images(desk: Desk) -> None:
    desk.write("photos/labels.csv", "file,label")
    data.load(folder_of(desk, "photos/0.png", "photos/1.png") + "/photos")


def empty_class(desk: Desk) -> None:
    desk.write("bee/notes.txt", "none yet")
    data.load(folder_of(desk, "ant/0.png"))


def cut_image(desk: Desk) -> None:
    path = desk.folder / "0.jpg"
    write_image(path, random_pixels(24, 20, 3))
    path.write_bytes(path.read_bytes()[:800])
    read_images(path)


def grey_of_floats(desk: Desk) -> None:
    path = desk.folder / "0.tif"
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(path)
    read_images(path)


def read_images(*paths: Path) -> None:
    files = data.FileImages(paths, torch.zeros(len(paths), dtype=torch.int64))
    files.read(torch.arange(len(paths)), Preprocessing(8, 8))


def large_image() -> bytes:
    """The beginning of a PNG of 30,000 × 30,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100)))


def damaged_cifar(desk: Desk) -> None:
    desk.write("cifar-10-batches-py/data_batch_1", b"not as published")
    data.load(f"cifar10:{desk.folder}")


def mislabelled_cifar(desk: Desk) -> None:
    (desk.folder / "train").mkdir()
    Image.fromarray(random_pixels(64, 32, 3)).save(desk.folder / "train" / "0.webp", lossless=True)
    np.save(desk.folder / "train_labels.npy", np.array([1, 10]))
    data.load(f"cifar10:{desk.folder}")


def short_fashion_mnist(desk: Desk) -> None:
    head = bytes([0, 0, 8, 3]) + struct.pack(">III", 2, 28, 28)
    desk.write("train-images-idx3-ubyte", head + bytes(28 * 28))
    data.load(f"fashion-mnist:{desk.folder}")


def few_of_imagenet(desk: Desk) -> None:
    write_classes(desk.folder / "train", ["n01440764"], 1)
    data.load(f"imagenet:{desk.folder}")


def unsorted_imagenet(desk: Desk) -> None:
    write_classes(desk.folder / "train", ["n01440764"], 1)
    write_image(desk.folder / "val" / "ILSVRC2012_val_00000001.JPEG", random_pixels(8, 8, 3))
    data.load(f"imagenette:{desk.folder}")


BIRDS = {
    "images": "1 001.Auk/a.jpg\n2 001.Auk/b.jpg\n3 002.Emu/c.jpg\n",
    "classes": "1 001.Auk\n2 002.Emu\n",
    "image_class_labels": "1 1\n2 1\n3 2\n",
    "train_test_split": "1 1\n2 0\n3 1\n",
    "bounding_boxes": "1 2.0 4.0 10.0 8.0\n2 0.0 0.0 5.0 5.0\n3 1.0 1.0 30.0 12.0\n",
    "parts": "1 beak\n",
    "part_locs": "1 1 5.0 6.0 1\n2 1 1.0 1.0 1\n3 1 10.0 7.0 1\n",
}
"""The tables of CUB-200-2011 in miniature."""


def birds(desk: Desk, **changes: str | None) -> None:
    """Reads the birds with tables that have another text, or are not there."""
    for name, text in {**BIRDS, **changes}.items():
        if text is not None:
            desk.write(f"{name}.txt", text)
    data.load(f"cub:{desk.folder}")


def zipped_bomb(desk: Desk) -> None:
    desk.write("images.txt.gz", 65 * gzip.compress(bytes(2**20)))
    birds(desk, images=None)


def masked(desk: Desk, mask: Pixels | None) -> None:
    """Reads an image of 8×8 with this mask, whose values up to 1 have names."""
    write_image(desk.folder / "images" / "0.png", random_pixels(8, 8, 3))
    (desk.folder / "masks").mkdir()
    if mask is not None:
        write_image(desk.folder / "masks" / "0.png", mask)
    desk.write("classes.txt", "background\nroad\n")
    annotated = annotated_images(f"masks:{desk.folder}")
    assert annotated is not None
    annotated.regions(torch.tensor([0]), Preprocessing(8, 8))


def broden(desk: Desk) -> None:
    desk.write("label.csv", "number,name,category\n1,sky,object\n")
    desk.write("index.csv", "image,split,ih,iw,sh,sw,object\na.jpg,train,8,8,8,8,a.png\n")
    annotated_images(f"broden:{desk.folder}")


# --- the machine -------------------------------------------------------------------------------


def full_disk(desk: Desk) -> None:
    with FailingDisk(desk.folder, fails_at=2).mounted():
        replace_file(desk.folder / "plan.json", "{}")


def linked_folder(desk: Desk) -> None:
    (desk.folder / "link").symlink_to(desk.folder / "elsewhere")
    make_inner_folder(desk.folder / "link")


def too_large_a_step(desk: Desk) -> None:
    with mock.patch.object(memory_check, "free_bytes", return_value=1000):
        memory_check.check_training(network(), images(2), 128)


def failing_run(desk: Desk, error: Exception) -> None:
    """`secateur prune` where the machine fails."""
    with mock.patch.object(runs, "run", side_effect=error):
        desk.prune()


# --- the rows ----------------------------------------------------------------------------------


def named_network(desk: Desk) -> None:
    """A run of a built-in network is scored beside another one."""
    folder = changed(
        desk,
        MANIFEST,
        lambda text: re.sub(r'"architecture": "[^"]*"', '"architecture": "resnet20"', text),
    )
    secateur_command("evaluate", folder, "-m", "resnet56")


def on_the_hub(
    case: Callable[[Desk], object], *, token: str = TOKEN, endpoint: str | None = None
) -> Callable[[Desk], object]:
    """The case before a mock of the Hub with an open and a gated repository."""

    def run(desk: Desk) -> None:
        constants = pytest.importorskip("huggingface_hub.constants")
        with contextlib.ExitStack() as stack:
            hub = stack.enter_context(mock_hub(desk.folder))
            hub.repositories |= {"me/open": Repository(), "me/gated": Repository(gated=True)}
            if endpoint is not None:
                stack.enter_context(mock.patch.object(constants, "ENDPOINT", endpoint))
            stack.enter_context(mock.patch.dict(os.environ, {"HF_TOKEN": token}))
            case(desk)

    return run


CASES: dict[str, Callable[[Desk], object]] = {
    # the request
    "no network has this name": lambda desk: desk.prune("-m", "resnet57"),
    "no criterion has this name": lambda desk: desk.prune("--criterion", "tailor"),
    "no kind of data set has this name": lambda desk: desk.prune("-d", "cifar:data"),
    "no key of the configuration has this name": lambda desk: desk.prune(
        "--set", "finetune.mixpu=0.2"
    ),
    "a value is out of bounds": lambda desk: desk.prune("--learning-rate", 0),
    "no network is named": lambda desk: secateur_command("prune", "-d", desk.files.source),
    "no data set is named": lambda desk: secateur_command("prune", "-m", "resnet20"),
    "no weights are named": lambda desk: desk.prune("-m", "resnet20", "--no-allow-untrained"),
    "a setting has no value": lambda desk: desk.prune("--set", "finetune.mixup"),
    "the target is of an unknown quantity": lambda desk: desk.prune("-t", "speed=0.5"),
    "the target is out of range": lambda desk: desk.prune("-t", "macs=70"),
    "the target can't be reached": lambda desk: secateur.prune(
        network(), [images()], target="macs=0.01"
    ),
    "no layer has the name to exclude": lambda desk: secateur.prune(
        network(), [images()], settings={"plan.exclude": ["conv4"]}
    ),
    "the configuration file does not exist": lambda desk: desk.prune(
        "-c", desk.folder / "run.toml"
    ),
    "the configuration is not TOML": lambda desk: read_config(
        desk.write("run.toml", "[model]\nname = resnet20\n")
    ),
    "the configuration nests too deeply": lambda desk: read_config(
        desk.write("run.toml", "a." * 1000 + "a = 1")
    ),
    "the configuration is too large": large_config,
    "an extra is not installed": missing_extra,
    # a network of one's own
    "its file does not exist": lambda desk: zoo.load(f"{desk.folder / 'net.py'}:small"),
    "its file has no such function": lambda desk: zoo.load(desk.files.model_name.removesuffix("l")),
    "its file fails": lambda desk: zoo.load(desk.user_code("import not_there")),
    "its function fails": lambda desk: zoo.load(
        desk.user_code(
            "import torch\ndef small():\n    torch.nn.Linear(2, 2).load_state_dict({})\n"
        )
    ),
    "its code branches on computed values": lambda desk: labelled(Branching()),
    "it returns a map, and images have classes": lambda desk: labelled(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    ),
    "it guesses": lambda desk: prune_strictly(network(), [(images(200), torch.randint(4, (200,)))]),
    "its classes are in another order": lambda desk: prune_strictly(colour_network(), colours(1)),
    "it is TorchScript": lambda desk: labelled(scripted()),
    "it is quantised": lambda desk: labelled(quantised()),
    "it is on the `meta` device": lambda desk: labelled(Branching().to("meta")),
    "it has a lazy layer": lambda desk: labelled(nn.Sequential(nn.LazyConv2d(4, 3))),
    "a state dict is passed": lambda desk: labelled(Branching().state_dict()),
    "a list of layers is passed": lambda desk: labelled([nn.Conv2d(3, 4, 3), nn.ReLU()]),
    "a name is passed": lambda desk: labelled("resnet20"),
    "it is trained without gradients": lambda desk: labelled(WithoutGradients(), epochs=1),
    "its images have another size": lambda desk: fit(desk, FIXED_SIZE),
    "its images are too small": lambda desk: fit(desk, LARGE_KERNEL, "--image-size", 8),
    "its images have more channels than files": lambda desk: fit(desk, FOUR_CHANNELS),
    # weights
    "the weight file does not exist": lambda desk: read_checkpoint(desk.folder / "weights.pth"),
    "an address in place of a file": lambda desk: read_checkpoint(
        Path("https://download.pytorch.org/models/resnet18-f37072fd.pth")
    ),
    "the file is empty": lambda desk: read_checkpoint(desk.write("weights.pth", b"")),
    "the file is of another format": lambda desk: read_checkpoint(
        desk.write("weights.pth", b"no pickle at all")
    ),
    "the file is a web page": lambda desk: read_checkpoint(
        desk.write("weights.pth", b"<!DOCTYPE html><html>")
    ),
    "the file is a pointer to a larger one": lambda desk: read_checkpoint(
        desk.write("weights.pth", b"version https://git-lfs.github.com/spec/v1")
    ),
    "the file is compressed": lambda desk: read_checkpoint(
        desk.write("weights.pth", gzip.compress(b"weights"))
    ),
    "the file holds objects of other classes": pickled,
    "the file holds a whole network": whole_network,
    "the file holds no tensors": lambda desk: loaded_from(desk, {"epoch": 3}),
    "the file holds several networks": lambda desk: loaded_from(
        desk, {"student": state(desk), "teacher": state(desk, seed=1)}
    ),
    "the key is not in the file": lambda desk: loaded_from(desk, {"net": state(desk)}, key="ema"),
    "the download of a file broke off": cut_zip,
    "a file of torch.save was damaged": flipped_in_zip,
    "a safetensors file was cut off": lambda desk: read_checkpoint(
        desk.write("weights.safetensors", safetensors_io.to_bytes({"weight": torch.zeros(9)})[:-4])
    ),
    "a shard is missing": missing_shard,
    "a folder holds several weight files": several_files,
    "a folder of another kind": other_folder,
    "a safetensors file claims too much": large_header,
    "a safetensors file of ours was damaged": flipped_value,
    "the weights are for another network": other_weights,
    "the weights are for other classes": other_classes,
    "the weights hold NaN": not_finite,
    # run folders
    "the folder for the results is in use": not_empty,
    "the folder holds something else": something_else,
    "the folder for the results is a file": lambda desk: desk.prune("-o", desk.write("run", "")),
    "the folder for the results is a mount point": mounted,
    "another run is using the folder": two_at_once,
    "a run is resumed with other settings": resumed_otherwise,
    "a base network is trained in a run's folder": base_in_run,
    "the folder holds no run": lambda desk: secateur_command("export", desk.folder),
    "a file of the run is missing": missing_member,
    "a file of the run was changed": lambda desk: run_folder.load_program(
        changed(desk, PLAN, lambda text: text.replace("0.6", "0.7"))
    ),
    "the run was written by a later secateur": lambda desk: run_folder.load_program(
        changed(desk, MANIFEST, lambda text: text.replace('version": 2', 'version": 3'))
    ),
    "the run was written by an earlier secateur": lambda desk: run_folder.load_program(
        changed(desk, MANIFEST, lambda text: text.replace('version": 2', 'version": 1'))
    ),
    "the manifest lists a file that is not of a run": listed_outside,
    "the program calls a forbidden operation": unknown_call,
    "the plan is for another network": lambda desk: load_run(desk.whole, desk, classes=4),
    "the weights are not those of the plan": weights_of_another,
    "the network before the cut has other weights": made_from_other_weights,
    "the run is of a network from a file of code": lambda desk: secateur_command(
        "finetune", desk.run()
    ),
    "the network is in code that loading won't run": lambda desk: run_folder.load(desk.whole),
    "the data are not those of the run": lambda desk: secateur_command(
        *(
            "evaluate",
            desk.whole,
            "-d",
            folder_of(desk, *(f"{name}/{n}.png" for name in ("cow", "dog") for n in range(9))),
        )
    ),
    "another network is named than the run's": named_network,
    # Hugging Face Hub
    "no repository has the name": on_the_hub(lambda desk: run_folder.load("hf://me/none")),
    "the repository is gated": on_the_hub(lambda desk: run_folder.load("hf://me/gated")),
    "the repository has no such branch": on_the_hub(
        lambda desk: run_folder.load("hf://me/open@v9")
    ),
    "the text is no address": lambda desk: run_folder.load("hf://small"),
    "the command needs a folder": lambda desk: secateur_command("finetune", "hf://me/open"),
    "you may not write there": on_the_hub(lambda desk: push(desk.whole, "me/small"), token=""),
    "the repository is public": on_the_hub(lambda desk: push(desk.whole, "me/open", private=True)),
    "the Hub can't be reached": on_the_hub(
        lambda desk: run_folder.load("hf://me/open"), endpoint="http://127.0.0.1:9"
    ),
    # data sets
    "the folder does not exist": lambda desk: data.load(f"folder:{desk.folder / 'none'}"),
    "the kind of data set is not named": lambda desk: data.load(str(desk.folder)),
    "the data set is an archive": lambda desk: data.load(f"folder:{desk.write('photos.zip', '')}"),
    "the folder has no classes": lambda desk: data.load(folder_of(desk)),
    "the images are not sorted into classes": unsorted_images,
    "the folder around the data set is named": lambda desk: data.load(
        folder_of(desk, *(f"photos/{part}/{name}/0.png" for part in PARTS for name in CLASSES))
    ),
    "there is only one class": lambda desk: data.load(folder_of(desk, "ant/0.png")),
    "each class has parts": lambda desk: data.load(
        folder_of(desk, *(f"{name}/{part}/0.png" for part in PARTS for name in CLASSES))
    ),
    "a class has no images": empty_class,
    "a class has too few images": lambda desk: data.load(folder_of(desk, "ant/0.png", "bee/0.png")),
    "the parts have different classes": lambda desk: data.load(
        folder_of(desk, "train/ant/0.png", "train/bee/0.png", "test/ant/0.png")
    ),
    "there is no training part": lambda desk: data.load(
        folder_of(desk, "test/ant/0.png", "val/ant/0.png")
    ),
    "an image was cut off": cut_image,
    "several files are not images": lambda desk: read_images(
        desk.write("0.png", "none"), desk.write("1.png", "none")
    ),
    "a TIFF has many bands": lambda desk: read_images(desk.write("0.tif", tiff_of(bands=5))),
    "greys have no known range": grey_of_floats,
    "an image has too many pixels": lambda desk: read_images(desk.write("0.png", large_image())),
    "the head has fewer classes than the data": lambda desk: desk.prune("--num-classes", 2),
    "CIFAR-10: a file is not as published": damaged_cifar,
    "CIFAR-10: a label is out of range": mislabelled_cifar,
    "Fashion-MNIST: a file is too short": short_fashion_mnist,
    "ImageNet: classes are missing": few_of_imagenet,
    "ImageNet: the images are not sorted": unsorted_imagenet,
    "CUB-200-2011: a table is missing": lambda desk: birds(desk, bounding_boxes=None),
    "CUB-200-2011: images are missing": birds,
    "CUB-200-2011: a table names a file elsewhere": lambda desk: birds(
        desk, images="1 ../../x\n2 001.Auk/b.jpg\n3 002.Emu/c.jpg\n"
    ),
    "a packed table is too large": zipped_bomb,
    # masks and other annotations
    "there are no masks": lambda desk: annotated_images(f"masks:{desk.folder}"),
    "an image has no mask": lambda desk: masked(desk, None),
    "a mask has another size": lambda desk: masked(desk, np.zeros((8, 10), np.uint8)),
    "a mask is in colours": lambda desk: masked(desk, np.zeros((8, 8, 3), np.uint8)),
    "a mask holds a number without a name": lambda desk: masked(desk, np.full((8, 8), 7, np.uint8)),
    "Broden: images are missing": broden,
    # from Python
    "the target names two quantities": lambda desk: secateur.prune(
        network(), images(), target={"macs": 0.5, "latency": 0.7}
    ),
    "a setting has no section": lambda desk: secateur.prune(
        network(), images(), settings={"round_to": 8}
    ),
    "a number of epochs is none": lambda desk: secateur.prune(network(), images(), epochs=True),
    "the criterion is none": lambda desk: secateur.prune(
        network(),
        images(),
        criterion=5,  # type: ignore[arg-type]
    ),
    "a criterion returns other scores": lambda desk: secateur.prune(
        network(), images(), criterion=lambda kernels: kernels.sum()
    ),
    "images are a folder": lambda desk: secateur.prune(network(), "photos"),
    "images are bytes": lambda desk: secateur.prune(network(), [(255 * images()).byte()]),
    "images are pictures": lambda desk: secateur.prune(network(), [Image.new("RGB", (8, 8))]),
    "batches have other names": lambda desk: secateur.prune(
        network(), [{"foo": images(), "bar": torch.zeros(60)}]
    ),
    "labels are names": lambda desk: secateur.prune(network(), [(images(), ["cat"] * 60)]),
    "labels are those of a regression": lambda desk: secateur.prune(
        one_output(), [(images(), torch.full((60,), 0.37))]
    ),
    "labels count from 1": lambda desk: labelled_by(1 + torch.arange(60) % 4),
    "images without a class have a label": lambda desk: labelled_by(-torch.ones(60)),
    "labels have other columns than the outputs": lambda desk: labelled_by(torch.ones(60, 3)),
    "labels are no probabilities": lambda desk: labelled_by(torch.full((60, 4), 0.4)),
    "one output is always above 0": lambda desk: secateur.prune(
        nn.Sequential(one_output(), nn.Softplus()), images()
    ),
    "a batch of several inputs is not one": lambda desk: secateur.prune(
        Beside(), [((images(), torch.rand(40, 5)), torch.zeros(60).long())]
    ),
    "a network returns several things": lambda desk: secateur.prune(ByName(), images()),
    "images have other channels": lambda desk: secateur.prune(network(), images()[:, :1]),
    "channels come last": lambda desk: secateur.prune(network(), images().movedim(1, -1)),
    "a run was made with `forward`": made_with_forward,
    "there are too few images": lambda desk: secateur.prune(network(), [images(10)]),
    # the machine
    "the disk is full": full_disk,
    "the folder is a symbolic link": linked_folder,
    "a training step would not fit into memory": too_large_a_step,
    "memory has run out": lambda desk: failing_run(desk, torch.OutOfMemoryError("out of memory")),
    "another process of the run has ended": lambda desk: failing_run(
        desk, RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    ),
    "the network has parameters that it does not use": lambda desk: failing_run(
        desk, RuntimeError("Expected to have finished reduction in the prior iteration before …")
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    """A user's files, and a run folder of them."""
    files = Case(tmp_path_factory.mktemp("files"), report_images=0)
    files.write()
    with mock.patch.object(runs, "write_report"):  # what draws its charts takes seconds to import
        runs.run(files.config(epochs=0), files.folder / "run")
    return files, files.folder / "run"


@pytest.fixture
def desk(made: tuple[Case, Path], tmp_path: Path) -> Desk:
    return Desk(tmp_path, *made)


def test_every_row_has_a_case_and_every_case_a_row() -> None:
    assert [row.wrong for row in ROWS] == list(CASES)


def test_every_row_has_a_remedy() -> None:
    assert all(row.remedy for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_message_is_that_of_the_page(row: Row, desk: Desk) -> None:
    message = message_of(CASES[row.wrong], desk)
    assert len(message.splitlines()) == 1
    assert re.fullmatch(row.pattern, message), message
