"""Folders and indices of shards are read, and other folders are said to be what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.models.checkpoint_files import digest, read_checkpoint
from secateur.models.weights import load_weights
from secateur.runtime.errors import WeightsError
from secateur.runtime.hashing import file_hash, weights_hash


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


@pytest.fixture
def state() -> dict[str, Tensor]:
    return {name: tensor + 1 for name, tensor in network().state_dict().items()}


def write_shards(folder: Path, state: dict[str, Tensor], kind: str, stem: str = "model") -> Path:
    """Write two shards and their index as accelerate and transformers do; return the index."""
    names = sorted(state)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:4], names[4:]), 1):
        file = f"{stem}-{number:05}-of-00002.{kind}"
        tensors = {name: state[name] for name in part}
        if kind == "bin":
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def assert_loads(path: Path, state: dict[str, Tensor]) -> None:
    model = network()
    load_weights(model, path)
    assert weights_hash(model.state_dict()) == weights_hash(state)


@pytest.mark.parametrize(
    ("kind", "stem"),
    [("safetensors", "model"), ("bin", "pytorch_model"), ("safetensors", "diffusion_model")],
)
def test_shards_are_read_from_their_folder_and_from_their_index(
    kind: str, stem: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    index = write_shards(tmp_path, state, kind, stem)
    (tmp_path / "config.json").write_text("{}")
    assert_loads(index, state)
    assert_loads(tmp_path, state)
    assert digest(index) == digest(tmp_path) != file_hash(index)


def test_a_shard_changes_the_digest(state: dict[str, Tensor], tmp_path: Path) -> None:
    write_shards(tmp_path, state, "safetensors")
    before = digest(tmp_path)
    shard = next(tmp_path.glob("*-00002-of*"))
    save_file({"other": torch.ones(1)}, shard)
    assert digest(tmp_path) != before
    save_file(state, tmp_path / "whole")
    assert digest(tmp_path / "whole") == file_hash(tmp_path / "whole")


FOLDERS: dict[str, tuple[str, ...]] = {
    "accelerate": ("model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"),
    "accelerate, older": ("pytorch_model.bin", "optimizer.bin", "sampler.bin"),
    "transformers": ("model.safetensors", "config.json", "training_args.bin", "optimizer.pt"),
    "both kinds": ("model.safetensors", "pytorch_model.bin", "README.md"),
    "secateur train": ("model.safetensors", "config.toml", "training.json", "log.jsonl"),
    "one file": ("best.pth.tar", "args.yaml", "events.out"),
    "one file beside an optimiser": ("net.pt", "optimizer.pt", "rng_state.pth"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_weights_of_a_folder_are_read(
    kind: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    first, *others = FOLDERS[kind]
    if first.endswith(".safetensors"):
        save_file(state, tmp_path / first)
    else:
        torch.save(state, tmp_path / first)
    for name in others:
        (tmp_path / name).write_bytes(b"not read")
    assert_loads(tmp_path, state)


REFUSED: list[tuple[tuple[str, ...], str]] = [
    ((), r"holds no weight file, but nothing: name the file itself"),
    (("config.json", "photo.jpg"), r"holds no weight file, but config\.json, photo\.jpg: name"),
    (("checkpoint-500/", "checkpoint-900/"), r"but checkpoint-500, checkpoint-900: name"),
    (("epoch1.pth", "epoch2.pth"), r"several weight files: name one of epoch1\.pth, epoch2\.pth"),
    (("a.safetensors", "b.ckpt"), r"several weight files: name one of a\.safetensors, b\.ckpt"),
    (("model.safetensors", "model_1.safetensors"), r"of several networks: name one of model\.s"),
    ((".metadata", "__0_0.distcp"), r"torch\.distributed\.checkpoint, .* dcp_to_torch"),
    (("zero_to_fp32.py", "latest"), r"is a DeepSpeed folder, .*zero_to_fp32\.py"),
    (("data.pkl", "version", "data/"), r"is an unpacked torch file, .* zip -0 -r weights\.pth"),
    (("saved_model.pb", "variables/"), "is a TensorFlow SavedModel"),
    (("net.index", "net.data-00000-of-00001"), "is a TensorFlow checkpoint"),
    (("_CHECKPOINT_METADATA", "d/"), r"is a JAX \(Orbax\) checkpoint"),
    (("plan.json", "manifest.json", "model.safetensors"), "is the run folder of a pruned network"),
]


@pytest.mark.parametrize(("names", "message"), REFUSED)
def test_other_folders_are_refused_with_a_remedy(
    names: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    for name in names:
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_bytes(b"x")
    with pytest.raises(WeightsError, match=message) as caught:
        read_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def change_map(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def apply(index: Path) -> None:
        content = json.loads(index.read_text())
        change(content)
        index.write_text(json.dumps(content))

    return apply


def remove_shard(index: Path) -> None:
    next(index.parent.glob("*-00002-of*")).unlink()


def empty_shard(index: Path) -> None:
    save_file({"other": torch.ones(1)}, next(index.parent.glob("*-00002-of*")))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_shard, r"lists model-00002-of-00002\.safetensors, which is missing: copy all"),
        (empty_shard, r"model-00002-of-00002\.safetensors lacks 1\.running_mean, which .*index"),
        (change_map(lambda c: c.update(weight_map={"a": "../w.pth"})), "lies outside of"),
        (change_map(lambda c: c.update(weight_map={"a": "/etc/passwd"})), "lies outside of"),
        (change_map(lambda c: c.update(weight_map=[1])), "is not an index of weight files"),
        (change_map(lambda c: c.clear()), "is not an index of weight files: KeyError"),
        (change_map(lambda c: c.update(weight_map={})), "holds no state dict"),
        (lambda index: index.write_text("[" * 100_000), "is not an index of weight files"),
        (lambda index: index.write_bytes(b"\xff\xfe"), "is not an index of weight files"),
    ],
)
def test_a_damaged_index_is_refused(
    damage: Callable[[Path], object], message: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "w.pth")
    (tmp_path / "run").mkdir()
    index = write_shards(tmp_path / "run", state, "safetensors")
    damage(index)
    with pytest.raises(WeightsError, match=message) as caught:
        load_weights(network(), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_linked_shards_are_read(state: dict[str, Tensor], tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    write_shards(blobs, state, "safetensors")
    snapshot = tmp_path / "snapshot"  # as the cache of the Hugging Face Hub keeps them
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert_loads(snapshot, state)
    shutil.rmtree(blobs)
    with pytest.raises(WeightsError, match=r"no file .*index\.json"):
        read_checkpoint(snapshot)
