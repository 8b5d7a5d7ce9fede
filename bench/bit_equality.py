"""Compare what two revisions compute, to the last bit.

A change of names and of structure must not change a score, a plan, a weight or an output. Keep the
revision to compare with in a second working tree (e41d328 is the last one before the modules got
the names that they have now) and run both:

    git worktree add ../before e41d328
    python bench/bit_equality.py --before ../before/src --cifar10 DIR --weights DIR --keep FOLDER

`--cifar10` is the folder of CIFAR-10 as `secateur prune --data cifar10:DIR` takes it, `--weights`
the folder with `cifar10_resnet20.safetensors`; without the two, ResNet-20 is left out. Each
revision runs in a process of its own, on one thread. With `--keep` the results stay in a folder,
and a later call with the same networks and data only runs the later revision again.

Prints one line for each network and quantity. Exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

QUANTITIES = ("scores", "plan", "figures", "weights", "outputs")
TENSORS = ("scores", "weights", "outputs")
"""Quantities that are stored as tensors; the others are stored as JSON."""
OUTPUTS = ".outputs.safetensors"
UNTIMED = ("metric", "top5_fraction", "loss", "images", "macs", "parameters")
"""Fields of a stage's score that don't depend on how busy the machine is."""
CALIBRATION_IMAGES = 256

Setting = tuple[tuple[str, Any], ...]
"""A configuration key and its value, first as they are named now, then as they were before."""
CALIBRATION: Setting = (("data.calibration_images", 256), ("data.probe_images", 256))
SENSITIVITY: Setting = (("plan.allocation", "sensitivity"), ("plan.allocation", "curves"))
PRUNE_RESIDUAL: Setting = (("plan.prune_residual", True), ("plan.cut_stream", True))
DISTILL: Setting = (("distill.epochs", 1), ("polish.epochs", 1))
CONSUMERS: Setting = (("refit.layers", "consumers"), ("refit.layers", "readers"))
NO_RECALIBRATION: Setting = (("refit.recalibrate_batchnorm", False), ("refit.norms", False))
EMA: Setting = (("finetune.ema_decay", 0.9), ("finetune.average", 0.9))
ACCUMULATION: Setting = (
    ("finetune.gradient_accumulation_steps", 2),
    ("finetune.accumulate", 2),
)
FREEZE_BATCHNORM: Setting = (
    ("finetune.freeze_batchnorm", True),
    ("finetune.mode", "evaluation"),
)
VOTE_TOP: Setting = (("score.vote_mode", "top"), ("score.ballot", "top"))
VOTE_REGIONS: Setting = (("score.voting_unit", "regions"), ("score.voters", "regions"))
CRITERIA = (
    *("vote", "vote-response", "vote-iou", "random", "l1", "l2", "fpgm", "bn_scale", "apoz"),
    *("activation_mean", "activation_std", "activation_entropy", "hrank", "chip"),
    *("reconstruction", "taylor"),
)


def always(key: str, value: Any) -> Setting:
    """Return a setting whose key has had one name only."""
    return ((key, value),)


VARIANTS: dict[str, tuple[dict[str, Any], tuple[Setting, ...]]] = {
    **{f"criterion {name}": ({"criterion": name}, ()) for name in CRITERIA},
    "vote of the top filters": ({"criterion": "vote-response"}, (VOTE_TOP,)),
    "vote by regions": ({"criterion": "vote-response"}, (VOTE_REGIONS,)),
    "concepts saliency": ({"concepts": "saliency"}, ()),
    "concepts colours": ({"concepts": "colours"}, ()),
    "concepts factors": ({"concepts": "factors:3"}, ()),
    "target params": ({"target": "params=0.6"}, ()),
    "target filters": ({"target": "filters=0.6"}, ()),
    "target memory": ({"target": "memory=0.8"}, ()),
    "allocation sensitivity": ({}, (SENSITIVITY,)),
    "allocation uniform": ({}, (always("plan.allocation", "uniform"),)),
    "allocation global": ({}, (always("plan.allocation", "global"),)),
    "multiples of 4": ({}, (always("plan.round_to", 4),)),
    "channels of skip connections": ({}, (PRUNE_RESIDUAL,)),
    "refit of consumers": ({}, (CONSUMERS,)),
    "refit by channels": ({}, (always("refit.form", "channel"),)),
    "no refit": ({}, (always("refit.layers", "none"), NO_RECALIBRATION)),
    "size search": ({}, (always("plan.max_drop", 20.0),)),
    "distillation": ({}, (DISTILL,)),
    "two rounds, fine-tuned": (
        {"epochs": 2},
        (always("plan.rounds", 2), always("finetune.feature_weight", 0.5), EMA, ACCUMULATION),
    ),
    "fine-tuned, batch norm frozen": ({"epochs": 1}, (FREEZE_BATCHNORM,)),
}
"""Of the depthwise network: arguments of `prune`, and settings."""


@dataclass(frozen=True)
class Request:
    """What both revisions are asked to run."""

    cifar10: str | None
    weights: str | None
    only: str


def main() -> None:
    """Run both revisions and compare; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, help="src of the earlier revision")
    parser.add_argument("--after", type=Path, default=Path(__file__).parents[1] / "src")
    parser.add_argument("--cifar10", help="the folder of CIFAR-10")
    parser.add_argument("--weights", help="the folder of base weights")
    parser.add_argument("--only", default="*", help="pattern of networks, such as 'depthwise*'")
    parser.add_argument("--keep", type=Path, help="folder for the results of both revisions")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    request = Request(arguments.cifar10, arguments.weights, arguments.only)
    if arguments.side is not None:
        run_side(request, arguments.side)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = arguments.keep or Path(temporary)
        before, after = folder / "before", folder / "after"
        if not is_complete(before, request):
            start_side(request, arguments.before, before)
            if not is_complete(before, request):
                sys.exit("the earlier revision failed")
        start_side(request, arguments.after, after)
        if not compare(before, after, request.only):
            sys.exit(1)


def start_side(request: Request, source: Path, folder: Path) -> None:
    """Run one revision in a process of its own that leaves its results in `folder`.

    Networks that fail there have none.
    """
    for file in folder.glob("*") if folder.is_dir() else ():
        file.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--before", str(source), "--side", str(folder.resolve())]
    for option, value in (("--cifar10", request.cifar10), ("--weights", request.weights)):
        command += [] if value is None else [option, value]
    environment = {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
        "PYTHONPATH": str(source.resolve()),
    }
    process = subprocess.run([*command, "--only", request.only], env=environment)
    if process.returncode == 0:
        (folder / "complete.json").write_text(json.dumps(_identity(request)))


def is_complete(folder: Path, request: Request) -> bool:
    """Return whether a folder holds what is requested, by the same script and libraries."""
    file = folder / "complete.json"
    if not file.is_file():
        return False
    stored = json.loads(file.read_text())
    everything = replace(request, only="*")
    return stored in (_identity(request), _identity(everything))


def _identity(request: Request) -> dict[str, Any]:
    script = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return {**asdict(request), "torch": torch.__version__, "script": script}


# --- one revision ----------------------------------------------------------------------------


def run_side(request: Request, folder: Path) -> None:
    """Run every network with the `secateur` that PYTHONPATH names, and write the results."""
    import secateur

    found, expected = Path(secateur.__file__), Path(os.environ["PYTHONPATH"])
    if expected not in found.parents:
        raise SystemExit(f"secateur is imported from {found}, not from {expected}")
    torch.set_num_threads(1)
    status = 0
    for name, run in cases(request):
        if fnmatch.fnmatch(name, request.only):
            print(f"{folder.name}: {name}", flush=True)
            try:
                write(folder, name, run())
            except Exception:  # the other networks are compared all the same
                traceback.print_exc()
                status = 1
    sys.exit(status)


def cases(request: Request) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield each network's name and a function that prunes it and returns the quantities."""
    if request.cifar10 is not None and request.weights is not None:
        weights = str(Path(request.weights) / "cifar10_resnet20.safetensors")
        source = f"cifar10:{request.cifar10}"
        yield "resnet20 (prune)", functools.partial(resnet20, source, weights)
        yield "resnet20 (run)", functools.partial(resnet20_run, source, weights)
    yield "mobilenet_v2", mobilenet_v2
    for title, (arguments, settings) in VARIANTS.items():
        yield f"depthwise ({title})", functools.partial(depthwise, arguments, settings)


def options(settings: Sequence[Setting]) -> dict[str, Any]:
    """Return settings under the names that the imported revision knows.

    Raises `SystemExit` where it knows none of a setting's names.
    """
    chosen = {}
    for setting in settings:
        known = [(key, value) for key, value in setting if _is_known(key, value)]
        if not known:
            raise SystemExit(f"no configuration key of {[key for key, _ in setting]}")
        key, value = known[0]
        chosen[key] = value
    return chosen


def _is_known(key: str, value: Any) -> bool:
    from secateur import RunConfig

    section, _, name = key.partition(".")
    table = RunConfig.model_fields.get(section)
    field = None if table is None else getattr(table.annotation, "model_fields", {}).get(name)
    if field is None:
        return False
    kind = field.annotation
    return get_origin(kind) is not Literal or value in get_args(kind)


def resnet20(source: str, weights: str) -> dict[str, Any]:
    """Prune ResNet-20 for CIFAR-10 in memory."""
    import secateur

    dataset = secateur.load_data(source)
    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)

    def images(part: Any, count: int) -> tuple[Tensor, Tensor]:
        numbers = torch.arange(count)
        pixels = torch.stack(part.originals(numbers))
        return (pixels.float() / 255 - mean) / std, part.labels[numbers]

    train, test = images(dataset.train, 640), images(dataset.test, 1000)
    model = secateur.load_model("resnet20", weights)
    result = secateur.prune(
        model, [train], test=[test], target="macs=0.5", settings=options([CALIBRATION, DISTILL])
    )
    return of_result(result, test[0])


def resnet20_run(source: str, weights: str) -> dict[str, Any]:
    """Prune ResNet-20 for CIFAR-10 into a run folder, and load what it holds."""
    import secateur

    calibration = next(iter(options([CALIBRATION]))).partition(".")[2]
    config = secateur.RunConfig.model_validate(
        {
            "model": {"name": "resnet20", "weights": weights},
            "data": {"source": source, calibration: CALIBRATION_IMAGES},
            "plan": {"target": "macs=0.5"},
            "finetune": {"epochs": 0},
            "report": {"images": 0},
            "seed": 0,
        }
    )
    dataset = secateur.load_data(source)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        result = secateur.run(config, folder)
        architecture = secateur.load_model("resnet20")
        model = secateur.load(folder, architecture=architecture)
        plan = json.loads((folder / "plan.json").read_text())
    pixels = torch.stack(dataset.test.originals(torch.arange(1000))).float() / 255
    return quantities(result, plan["removed"], model, pixels)


def mobilenet_v2() -> dict[str, Any]:
    """Prune torchvision's MobileNetV2 with random weights, on random images."""
    import torchvision

    import secateur

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(weights=None, num_classes=10, width_mult=0.5)
    images = torch.randn(96, 3, 48, 48, generator=generator)
    _set_batchnorm(model, images)
    result = secateur.prune(model, [images], target="macs=0.5")
    return of_result(result, images)


class Skip(nn.Module):
    """A skip connection around a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner: nn.Module = inner

    def forward(self, features: Tensor) -> Tensor:
        """Return the sum of the input and of what the module makes of it."""
        total: Tensor = features + self.inner(features)
        return total


class Depthwise(nn.Module):
    """Depthwise separable convolutions, two of them with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem: nn.Module = nn.Sequential(_convolution(3, 16, 3, stride=2), nn.ReLU())
        self.separable1: nn.Module = _separable(16, 24)
        self.separable2: nn.Module = nn.Sequential(
            Skip(_separable(24, 24)), Skip(_separable(24, 24))
        )
        self.separable3: nn.Module = _separable(24, 32, stride=2)
        self.head: nn.Linear = nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `[image, class]`."""
        features = self.separable2(self.separable1(self.stem(images)))
        features = self.separable3(features)
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


def _convolution(
    inputs: int, outputs: int, side: int, *, stride: int = 1, groups: int = 1
) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, side, stride, side // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def _separable(inputs: int, outputs: int, *, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        _convolution(inputs, inputs, 3, stride=stride, groups=inputs),
        nn.ReLU6(),
        _convolution(inputs, 2 * outputs, 1),
        nn.ReLU6(),
        _convolution(2 * outputs, outputs, 1),
    )


@functools.cache
def _trained_depthwise() -> tuple[Depthwise, Tensor, Tensor]:
    """Return the network `Depthwise`, trained on images of five kinds of stripes, and those."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    labels = torch.randint(5, (120,), generator=generator)
    rows = torch.arange(24).reshape(1, 1, 24, 1)
    stripes = ((rows // (labels.reshape(-1, 1, 1, 1) + 1)) % 2).float()
    images = stripes + torch.randn(120, 3, 24, 24, generator=generator)
    model = Depthwise()
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()
    return model.eval(), images, labels


def depthwise(arguments: Mapping[str, Any], settings: Sequence[Setting]) -> dict[str, Any]:
    """Prune the network `Depthwise`."""
    import secateur

    model, images, labels = _trained_depthwise()
    chosen = options([*settings, always("finetune.workers", 0), always("data.batch_size", 16)])
    request: dict[str, Any] = {"target": "macs=0.6", **arguments, "settings": chosen}
    return of_result(secateur.prune(model, [(images, labels)], **request), images)


def _set_batchnorm(model: nn.Module, images: Tensor) -> None:
    """Set batch norms to the statistics of these images, and give them scales of their own."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        norm.momentum = None
    model.train()
    with torch.no_grad():
        model(images)
    for norm in norms:
        norm.momentum = 0.1
    model.eval()


def of_result(result: Any, images: Tensor) -> dict[str, Any]:
    """Return the quantities of a `PruneResult`."""
    return quantities(result.result, result.plan.removed, result.model, images)


def quantities(
    result: Any, removed: Mapping[str, Sequence[int]], model: nn.Module, images: Tensor
) -> dict[str, Any]:
    """Return the quantities to compare, by the names in `QUANTITIES`."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        outputs = torch.cat([model(part) for part in images.split(100)])
    error = result.law_error if hasattr(result, "law_error") else result.equivalence_error
    return {
        "scores": {
            group.name: torch.tensor(group.scores, dtype=torch.float64) for group in result.groups
        },
        "plan": {name: list(filters) for name, filters in removed.items()},
        "figures": {
            "equivalence error": error,
            "stages": [
                {name: getattr(stage.score, name) for name in UNTIMED} for stage in result.stages
            ],
            "frozen": {group.name: group.filters for group in result.frozen},
        },
        "weights": dict(model.state_dict()),
        "outputs": {"logits": outputs},
    }


# --- both ------------------------------------------------------------------------------------


def write(folder: Path, name: str, found: Mapping[str, Any]) -> None:
    """Write what a network came to: tensors as safetensors, the rest as JSON."""
    for quantity in TENSORS:
        tensors = {key: tensor.contiguous().clone() for key, tensor in found[quantity].items()}
        save_file(tensors, folder / f"{name}.{quantity}.safetensors")
    rest = {quantity: found[quantity] for quantity in QUANTITIES if quantity not in TENSORS}
    (folder / f"{name}.json").write_text(json.dumps(rest))


def read(folder: Path, name: str) -> dict[str, Any]:
    """Return what `write` wrote."""
    found = json.loads((folder / f"{name}.json").read_text())
    for quantity in TENSORS:
        found[quantity] = load_file(folder / f"{name}.{quantity}.safetensors")
    return {quantity: found[quantity] for quantity in QUANTITIES}


def compare(before: Path, after: Path, only: str) -> bool:
    """Print a line for each network and quantity; return whether all are equal."""
    is_same = True
    names = [file.name.removesuffix(OUTPUTS) for file in sorted(before.glob(f"*{OUTPUTS}"))]
    names = fnmatch.filter(names, only)
    for name in names:
        if not (after / f"{name}.json").is_file():
            print(f"{name}: failed")
            is_same = False
            continue
        earlier, later = read(before, name), read(after, name)
        for quantity in QUANTITIES:
            if quantity in TENSORS:
                difference = tensor_difference(earlier[quantity], later[quantity])
            else:
                difference = value_difference(earlier[quantity], later[quantity])
            print(f"{name}: {quantity}: {f'differs: {difference}' if difference else 'equal'}")
            is_same = is_same and not difference
    print(f"{len(names)} runs: {'all equal' if is_same else 'NOT equal'}")
    return is_same and bool(names)


def value_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return the first value that differs between two tables, "" where none does."""
    keys = sorted(before.keys() | after.keys())
    different = [key for key in keys if before.get(key) != after.get(key)]
    if not different:
        return ""
    key = different[0]
    return f"{len(different)} of {len(keys)}, first {key}: {before.get(key)} → {after.get(key)}"


def tensor_difference(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str:
    """Return where two sets of tensors differ in a byte, "" where they don't."""
    if before.keys() != after.keys():
        return f"names {sorted(before.keys() ^ after.keys())} are on one side only"
    different = [name for name in before if _bytes(before[name]) != _bytes(after[name])]
    if not different:
        return ""
    name = different[0]
    earlier, later = before[name], after[name]
    if earlier.shape != later.shape or earlier.dtype != later.dtype:
        detail = f"{earlier.dtype} {list(earlier.shape)} → {later.dtype} {list(later.shape)}"
    else:
        detail = f"by at most {float((earlier.double() - later.double()).abs().max()):.3g}"
    return f"{len(different)} of {len(before)} tensors, first {name}: {detail}"


def _bytes(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return str(tensor.dtype), tuple(tensor.shape), flat.numpy().tobytes()


if __name__ == "__main__":
    main()
