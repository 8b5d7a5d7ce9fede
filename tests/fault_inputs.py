"""Valid inputs of every format that secateur reads, and random changes of their bytes."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from PIL import Image

from fault_case import CLASSES, SIDE, Case
from secateur import data
from secateur.config import RunConfig, from_dict, read_tables
from secateur.data.fashion_mnist import read_fashion_mnist
from secateur.data.imagenet import read_imagenette
from secateur.data.preprocessing import Preprocessing
from secateur.experiments import run as runs
from secateur.experiments import run_folder
from secateur.experiments.compare.job_files import JOBS, read_job, write_job
from secateur.experiments.compare.results import read_rows
from secateur.experiments.compare.spec import BenchmarkSpec, jobs_of
from secateur.experiments.manifest import MANIFEST
from secateur.experiments.report.benchmark import write_benchmark
from secateur.experiments.run_folder import Origin
from secateur.models import checkpoint_files, zoo
from secateur.pipeline.result import read_result
from secateur.pruning.cost.latency_model import Hardware, LatencyTable, LayerTimes
from secateur.runtime import safetensors_io
from secateur.runtime.errors import RunFolderError
from secateur.runtime.hashing import weights_hash
from secateur.runtime.input_limits import TEXT, read_bounded
from secateur.scoring.concepts.broden import read_broden
from secateur.scoring.concepts.cub import read_parts
from secateur.scoring.concepts.masks import read_masks
from secateur.training.checkpoint import Checkpoint, Checkpoints

Files = dict[str, bytes]
PREPROCESSING = Preprocessing(SIDE, SIDE)
TOKENS = (
    b"-1", b"0", b"1e308", b"1e999", b"NaN", b"-Infinity", b"9" * 400, b"null", b"true", b'""',
    b"[]", b"{}", b"[" * 3000, b'{"a":' * 2000, b"\x00", b"\xff\xfe", b"../../x", b"/etc/passwd",
    b"'", b'"', b"\\", b"\n", b",", b"=", b"18446744073709551615", b"[[a]]", b"\xf0\x9f\x8c\xb3",
)  # fmt: skip
"""Texts that parsers stumble over."""


@dataclass(frozen=True)
class Reader:
    """A function that reads files in a folder, with valid files for it."""

    name: str
    files: Files
    read: Callable[[Path], Any]
    expected: Any = None
    """The network that valid files hold; None if nothing is compared."""
    fix: Callable[[Files], Files] | None = None
    """Makes hashes match again, as an attacker would."""


def mutate(files: Files, generator: random.Random, fix: Callable[[Files], Files] | None) -> Files:
    """Return the files with one changed in one to four places, missing or replaced by another."""
    changed = dict(files)
    name = generator.choice(sorted(files))
    for _ in range(generator.randint(1, 4)):
        changed[name] = _changed(changed[name], generator)
    if generator.random() < 0.03:
        changed[name] = changed[generator.choice(sorted(files))]
    if generator.random() < 0.02:
        del changed[name]
    return changed if fix is None else fix(changed)


def _changed(content: bytes, generator: random.Random) -> bytes:
    start = generator.randrange(len(content) + 1)
    # Headers and keys are at the beginning, and few bytes among many.
    if generator.random() < 0.4:
        start = min(start, generator.randrange(200))
    end = min(len(content), start + generator.choice((1, 1, 2, 4, 8, 40, 400)))
    changes: tuple[Callable[[], bytes], ...] = (
        lambda: _flipped(content, min(start, len(content) - 1), generator) if content else b"",
        lambda: content[:start] + generator.randbytes(end - start) + content[end:],
        lambda: content[:start] + content[end:],
        lambda: content[:start] + generator.randbytes(generator.randint(1, 16)) + content[start:],
        lambda: content[:end] + content[start:end] * generator.randint(1, 50) + content[end:],
        lambda: content[:start] + generator.choice(TOKENS) + content[start:],
        lambda: content[:start] + generator.choice(TOKENS) + content[end:],
        lambda: content[:start],
        lambda: content[:start] + b"\x00" * (end - start) + content[end:],
        lambda: _with_number(content, start, generator),
    )
    return generator.choice(changes)()


def _flipped(content: bytes, place: int, generator: random.Random) -> bytes:
    bit = content[place] ^ (1 << generator.randrange(8))
    return content[:place] + bytes([bit]) + content[place + 1 :]


def _with_number(content: bytes, start: int, generator: random.Random) -> bytes:
    """A size or an offset that is far off, of one to eight bytes in either order."""
    form = generator.choice(("<B", "<H", "<I", "<Q", ">H", ">I", ">Q"))
    most = 256 ** struct.calcsize(form) - 1
    number = generator.choice((0, 1, most, most // 2, most // 2 + 1, generator.randint(0, most)))
    packed = struct.pack(form, number)
    return content[:start] + packed + content[start + len(packed) :]


# --- the readers -------------------------------------------------------------------------------


def readers(folder: Path) -> list[Reader]:
    """Return every reader, with files from a real run in the folder."""
    case = Case(folder)
    run, benchmark_folder = folder / "run", folder / "benchmark"
    result = runs.run(case.config(epochs=1), run)
    spec = case.benchmark()
    job, *others = jobs_of(spec)
    (benchmark_folder / JOBS).mkdir(parents=True)
    job_results = [write_job(benchmark_folder, job, spec, result=result)]
    job_results += [write_job(benchmark_folder, other, spec, failed="why") for other in others]
    write_benchmark(benchmark_folder, spec, job_results)
    model = zoo.load(case.model_name, num_classes=len(CLASSES))
    dependencies = Origin(None, (3, SIDE, SIDE)).build_dependency_graph(model)
    of_run = {
        path.name: path.read_bytes()
        for path in run.iterdir()
        if path.is_file() and path.name not in ("report.html", "log.jsonl")
    }

    def whole(folder: Path) -> object:
        return _network(run_folder.load(folder, architecture=model, dependencies=dependencies))

    def program(folder: Path) -> object:
        return _network(run_folder.load_program(folder))

    first_job = (benchmark_folder / JOBS / f"{job.id}.json").read_bytes()
    tables = {"benchmark.toml": tomli_w.dumps(spec.model_dump(exclude_unset=True)).encode()}
    rows = {"jobs.jsonl": (benchmark_folder / "jobs.jsonl").read_bytes()}
    all_readers = [
        Reader("run folder", of_run, whole, whole(run)),
        Reader("run folder as a program", of_run, program, program(run)),
        Reader("run folder, hashes made to match", of_run, whole, fix=_with_hashes),
        Reader("run folder as a program, hashes made to match", of_run, program, fix=_with_hashes),
        Reader("result", {"result.json": of_run["result.json"]}, read_result),
        Reader("configuration", {"config.toml": of_run["config.toml"]}, _read_config),
        Reader("benchmark", tables, _read_benchmark),
        Reader("job", {f"{JOBS}/{job.id}.json": first_job}, lambda at: read_job(at, job)),
        Reader("rows of jobs", rows, lambda at: read_rows(at / "jobs.jsonl")),
        Reader("latency table", {"latency.json": _latency().encode()}, _read_latency),
        *_weight_readers(folder, model),
        *_image_readers(),
        *_layout_readers(),
    ]
    for number, reader in enumerate(all_readers):  # unchanged files must be accepted
        write_files(reader.files, folder / f"valid-{number}")
        assert reader.read(folder / f"valid-{number}") == reader.expected or not reader.expected
    return all_readers


def write_files(files: Files, folder: Path) -> None:
    """Write files into a folder, which is made if needed."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _network(network: torch.nn.Module) -> tuple[str, bytes]:
    """Return a network's weights hash, and its output for two images."""
    image = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        outputs = network(image)
    return weights_hash(network.state_dict()), outputs.numpy().tobytes()


def _with_hashes(files: Files) -> Files:
    try:
        manifest = json.loads(files[MANIFEST])
        for name in manifest["files"]:
            manifest["files"][name] = hashlib.sha256(files[name]).hexdigest()
        plan = json.loads(files["plan.json"])
        content = {key: value for key, value in plan.items() if key != "hash"}
        text = json.dumps(content, sort_keys=True)
        plan["hash"] = manifest["plan_hash"] = hashlib.sha256(text.encode()).hexdigest()
        plan_text = json.dumps(plan, indent=2).encode() + b"\n"
        manifest["files"]["plan.json"] = hashlib.sha256(plan_text).hexdigest()
        return {**files, "plan.json": plan_text, MANIFEST: json.dumps(manifest).encode()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return files  # the manifest no longer lists hashes


def _read_config(folder: Path) -> object:
    return from_dict(read_tables(folder / "config.toml"), RunConfig)


def _read_benchmark(folder: Path) -> object:
    return from_dict(read_tables(folder / "benchmark.toml"), BenchmarkSpec)


def _latency() -> str:
    times = LayerTimes(layer="conv1", read=(1, 3), produced=(4, 8), ms=((0.1, 0.2), (0.3, 0.5)))
    place = Hardware(
        processor="any", threads=1, device="cpu", dtype="float32", engine="pytorch", version="2"
    )
    return LatencyTable(
        hardware=place,
        batch=16,
        block=4,
        layers=(times,),
        layers_factor=1.1,
        fixed_ms=0.2,
        ms_per_value=1e-7,
    ).to_json()


def _read_latency(folder: Path) -> object:
    text = read_bounded(folder / "latency.json", TEXT, RunFolderError)
    return LatencyTable.from_json(text.decode("utf-8", "replace"))


def _weight_readers(folder: Path, model: torch.nn.Module) -> list[Reader]:
    tensors = model.state_dict()
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(1, Checkpoint(tensors, {"training": {}, "position": {"epoch": 1}}))
    (file,) = (folder / "checkpoints").iterdir()
    expected = weights_hash(tensors)

    def read_checkpoint(at: Path) -> object:
        latest = Checkpoints(at).latest()
        return expected if latest is None else weights_hash(latest.tensors)

    def read_from(name: str) -> Callable[[Path], object]:
        return lambda at: weights_hash(checkpoint_files.read_checkpoint(at / name))

    ours = {"w.safetensors": safetensors_io.to_bytes(tensors)}
    return [
        Reader("weights, safetensors", ours, read_from("w.safetensors"), expected),
        Reader("weights, .pth", {"w.pth": buffer.getvalue()}, read_from("w.pth"), expected),
        Reader("checkpoint", {file.name: file.read_bytes()}, read_checkpoint, expected),
    ]


def _image_readers() -> list[Reader]:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8)
    readers = []
    for form, suffix in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("BMP", "bmp")):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, form)
        files = {
            f"{part}/{name}/{number}.{suffix}": buffer.getvalue()
            for part in ("train", "test")
            for name in ("one", "two")
            for number in range(2)
        }
        readers.append(Reader(f"images, {form}", files, _read_folder))
    return readers


def _read_folder(folder: Path) -> None:
    splits = data.load(f"folder:{folder}", validation_fraction=0.5)
    for part in (splits.train, splits.validation, splits.test):
        part.read(torch.arange(len(part.labels)), PREPROCESSING)


def _layout_readers() -> list[Reader]:
    return [
        Reader("masks", _masks(), lambda at: _read_annotated(read_masks(at))),
        Reader("Broden", _broden(), lambda at: _read_annotated(read_broden(at))),
        Reader("CUB-200-2011", _birds(), lambda at: _read_annotated(read_parts(at))),
        Reader("Imagenette", _imagenette(), read_imagenette),
        Reader("Fashion-MNIST", _fashion(), read_fashion_mnist),
    ]


def _read_annotated(images: Any) -> None:
    numbers = torch.arange(len(images.labels))
    images.read(numbers, PREPROCESSING)
    images.regions(numbers, PREPROCESSING)


def _png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def _masks() -> Files:
    generator = np.random.default_rng(0)
    files: Files = {"names.txt": b"sky\ngrass\ndog\ncat\n"}
    for number in range(2):
        picture = generator.integers(0, 255, (18, 20, 3), dtype=np.uint8)
        files[f"images/{number}.png"] = _png(picture)
        files[f"masks/{number}.png"] = _png(generator.integers(0, 4, (18, 20), dtype=np.uint8))
    return files


def _broden() -> Files:
    generator = np.random.default_rng(0)
    labels = "number,name,category,frequency,coverage,syns\n1,sky,object,2,1,\n2,red,color,2,1,\n"
    head = "image,split,ih,iw,sh,sw,color,object\n"
    row = "a/{0}.png,train,18,20,18,20,a/{0}_c.png,a/{0}_o.png\n"
    files = {"label.csv": labels.encode()}
    files["index.csv"] = (head + row.format(0) + row.format(1)).encode()
    for number in range(2):
        picture = generator.integers(0, 255, (18, 20, 3), dtype=np.uint8)
        files[f"images/a/{number}.png"] = _png(picture)
        for suffix, value in (("c", 2), ("o", 1)):
            mask = np.zeros((18, 20, 3), dtype=np.uint8)
            mask[4:9, 3:8, 0] = value
            files[f"images/a/{number}_{suffix}.png"] = _png(mask)
    return files


def _birds() -> Files:
    generator = np.random.default_rng(0)
    names = ("001.A/a.jpg", "001.A/b.jpg", "002.B/c.jpg")
    texts = {
        "images.txt": "".join(f"{number} {name}\n" for number, name in enumerate(names, 1)),
        "classes.txt": "1 001.A\n2 002.B\n",
        "image_class_labels.txt": "1 1\n2 1\n3 2\n",
        "train_test_split.txt": "1 1\n2 0\n3 1\n",
        "bounding_boxes.txt": "".join(f"{n} 2.0 3.0 8.0 9.0\n" for n in (1, 2, 3)),
        "parts/parts.txt": "1 beak\n2 tail\n",
        "parts/part_locs.txt": "".join(
            f"{n} {part} {4.0 + part} 6.0 1\n" for n in (1, 2, 3) for part in (1, 2)
        ),
    }
    files = {name: text.encode() for name, text in texts.items()}
    for name in names:
        buffer = io.BytesIO()
        picture = generator.integers(0, 255, (18, 20, 3), dtype=np.uint8)
        Image.fromarray(picture).save(buffer, "JPEG")
        files[f"images/{name}"] = buffer.getvalue()
    return files


def _imagenette() -> Files:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((18, 20, 3), dtype=np.uint8)).save(buffer, "JPEG")
    names = ("n01440764", "n01443537")
    return {
        f"{part}/{name}/{name}_{number}.JPEG": buffer.getvalue()
        for part in ("train", "val")
        for name in names
        for number in range(2)
    }


def _fashion() -> Files:
    generator = np.random.default_rng(0)
    files: Files = {}
    for part in ("train", "t10k"):
        pixels = generator.integers(0, 255, (20, 28, 28), dtype=np.uint8)
        labels = np.arange(20, dtype=np.uint8) % 10
        for name, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            content = gzip.compress(head + values.tobytes(), mtime=0)
            files[f"{part}-{name}-ubyte.gz"] = content
    return files
