"""What torch.save wrote is read without running code; what holds code is refused, with a remedy."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import pickle
import random
import shlex
import sys
import types
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from secateur.models.checkpoint_files import read_checkpoint
from secateur.models.torch_files import PLAIN
from secateur.models.weights import load_weights
from secateur.runtime.errors import WeightsError


def tiny() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def assert_same(model: nn.Module, state: dict[str, Tensor]) -> None:
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


SETTINGS: dict[str, object] = {
    "Namespace": argparse.Namespace(lr=0.1, data=Path("photos"), nested=argparse.Namespace(a=[1])),
    "SimpleNamespace": types.SimpleNamespace(lr=0.1),
    "defaultdict": collections.defaultdict(list, {"loss": [1.0, 2.0]}),
    "Counter": collections.Counter("abca"),
    "deque": collections.deque([1, 2], maxlen=3),
    "path": Path("a/b"),
    "Windows path": PureWindowsPath("a\\b"),
    "dates": [datetime.datetime(2026, 1, 2), datetime.timedelta(3), datetime.date(2026, 1, 2)],
    "time zone": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    "Decimal": decimal.Decimal("0.5"),
    "UUID": uuid.UUID(int=5),
    "frozenset": frozenset([1, 2]),
    "complex": 1 + 2j,
    "types": [int, float, dict],
    "NumPy scalars": [np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True)],
    "NumPy arrays": [np.arange(3), np.zeros((2, 2), np.float16), np.array(["a", "b"])],
    "random states": [np.random.get_state(), random.getstate(), torch.get_rng_state()],
    "generators": [np.random.default_rng(0), np.random.RandomState(0), random.Random(0)],
    "torch": [torch.Size([2, 3]), torch.float16, torch.device("cpu")],
    "torch.__version__": torch.__version__,
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("kind", SETTINGS)
def test_plain_data_beside_the_tensors_is_read(kind: str, is_zip: bool, tmp_path: Path) -> None:
    stored, model = tiny(), tiny()
    content = {"settings": SETTINGS[kind], "state_dict": stored.state_dict()}
    torch.save(content, tmp_path / "w", _use_new_zipfile_serialization=is_zip)
    load_weights(model, tmp_path / "w")
    assert_same(model, dict(stored.state_dict()))


def module_of(name: str, base: type, monkeypatch: pytest.MonkeyPatch) -> type:
    """Return a class that is pickled under another library's name."""
    module, _, short = name.rpartition(".")
    made = type(short, (base,), {"__module__": module})
    for end in range(1, module.count(".") + 2):
        parent = ".".join(module.split(".")[:end])
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    setattr(sys.modules[module], short, made)
    return made


class Holder:
    """An object with attributes, as OmegaConf's."""

    def __init__(self, content: object) -> None:
        self._content = content
        self._metadata = {"flags": None}


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("omegaconf.dictconfig.DictConfig", Holder),
        ("omegaconf.listconfig.ListConfig", Holder),
        ("ml_collections.config_dict.config_dict.ConfigDict", Holder),
        ("fastcore.foundation.L", Holder),
        ("yacs.config.CfgNode", dict),
        ("easydict.EasyDict", dict),
        ("lightning.fabric.utilities.data.AttributeDict", dict),
        ("pytorch_lightning.utilities.parsing.AttributeDict", dict),
    ],
)
def test_configurations_of_libraries_that_are_not_there_are_read(
    name: str, base: type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = module_of(name, base, monkeypatch)({"lr": 0.1, "layers": [1, 2]})
    stored, model = tiny(), tiny()
    torch.save({"cfg": config, "state_dict": stored.state_dict()}, tmp_path / "w.ckpt")
    monkeypatch.undo()
    load_weights(model, tmp_path / "w.ckpt")
    assert_same(model, dict(stored.state_dict()))


def test_no_name_that_is_read_runs_code() -> None:
    assert not {
        name for name in PLAIN if name.startswith(("os.", "sys.", "subprocess.", "torch.nn"))
    }
    for name in ("builtins.eval", "builtins.getattr", "builtins.exec", "builtins.__import__"):
        assert name not in PLAIN


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_that_would_run_code_is_refused_and_does_not(is_zip: bool, tmp_path: Path) -> None:
    content = {**tiny().state_dict(), "bomb": Bomb(tmp_path / "exploded")}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(WeightsError, match="is not read, since that could run code"):
        load_weights(tiny(), tmp_path / "w.pth")
    assert not (tmp_path / "exploded").exists()


def test_a_call_of_the_operating_system_is_named_and_not_to_be_converted(tmp_path: Path) -> None:
    class Call:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            import os

            return os.system, ("true",)

    torch.save({"a": Call()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"calls \w+\.system, .* don't use the file$"):
        read_checkpoint(tmp_path / "w.pth")


def command_in(message: str) -> str:
    """Return the Python code of the command that a message ends with."""
    python, option, code = shlex.split(message[message.index("python -c") :])
    assert (python, option) == ("python", "-c")
    return code


class Options:
    """A class of a user's, which holds no network."""

    def __init__(self) -> None:
        self.lr = 0.1


class Learner:
    """A class of a user's, which holds a network."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model


WITH_CODE: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "a network": (lambda model: model, "torch.nn.modules.container.Sequential"),
    "a network in a dict": (
        lambda model: {"epoch": 3, "net": model},
        "torch.nn.modules.container.Sequential",
    ),
    "a state dict beside an object": (
        lambda model: {"options": Options(), "weights": model.state_dict()},
        "test_torch_files.Options",
    ),
    "a network in an object": (lambda model: Learner(model), "test_torch_files.Learner"),
    "a class": (
        lambda model: {"activation": nn.ReLU, "state_dict": model.state_dict()},
        "torch.nn.modules.activation.ReLU",
    ),
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("kind", WITH_CODE)
def test_what_holds_code_is_named_with_a_command_that_converts_it(
    kind: str, is_zip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, name = WITH_CODE[kind]
    stored, model = tiny(), tiny()
    path = tmp_path / 'a user\'s "file".pth'
    torch.save(make(stored), path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(WeightsError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert f"holds {name}, not only tensors and plain data, and is not read" in message
    assert "\n" not in message
    monkeypatch.chdir(tmp_path)
    exec(command_in(message))
    if not is_zip and "(lambda" in message and kind != "a network":
        with pytest.raises(WeightsError) as caught:  # in a file of today it can be looked into
            read_checkpoint(Path("weights.pth"))
        exec(command_in(str(caught.value)))
    load_weights(model, "weights.pth")
    assert_same(model, dict(stored.state_dict()))


def test_what_torch_says_is_cut_to_one_line(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": [torch.ones(1)]}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"e}q", b"a}q", 1).replace(b"]q", b"}q", 1))
    with pytest.raises(WeightsError, match=r"w\.pth can't be read: [^\n\x1b]{5,120}$"):
        read_checkpoint(path)


def test_an_object_without_a_network_gets_no_command(tmp_path: Path) -> None:
    torch.save(Options(), tmp_path / "training_args.bin")
    with pytest.raises(WeightsError, match=r"Options, .* name another file, with the network's"):
        read_checkpoint(tmp_path / "training_args.bin")


@pytest.mark.parametrize("protocol", [4, 5])
def test_other_pickle_protocols_are_refused_with_a_command(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, model = tiny(), tiny()
    torch.save(stored.state_dict(), tmp_path / "w.pth", pickle_protocol=protocol)
    with pytest.raises(WeightsError, match="pickle protocol 3 or later") as caught:
        read_checkpoint(tmp_path / "w.pth")
    monkeypatch.chdir(tmp_path)
    exec(command_in(str(caught.value)))
    load_weights(model, "weights.pth")
    assert_same(model, dict(stored.state_dict()))


def test_a_pickle_of_python_is_refused_with_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, model = tiny(), tiny()
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(stored.state_dict()))
    with pytest.raises(WeightsError, match=r"a pickle that torch\.save did not write") as caught:
        read_checkpoint(tmp_path / "w.pkl")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(action="ignore"):  # the command leaves the file open
        exec(command_in(str(caught.value)))
    load_weights(model, "weights.pth")
    assert_same(model, dict(stored.state_dict()))


def test_the_globals_of_torch_are_left_as_they_were(tmp_path: Path) -> None:
    before: set[Any] = set(torch.serialization.get_safe_globals())
    torch.save({"args": argparse.Namespace(), "a": torch.ones(1)}, tmp_path / "w.pth")
    read_checkpoint(tmp_path / "w.pth")
    assert set(torch.serialization.get_safe_globals()) == before
