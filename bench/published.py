"""Load files as torchvision and timm publish them, and compare with their own loaders.

    python bench/published.py [--only PATTERN]

There is a case for every classification builder of torchvision (and for each image size that its
weights have) and for every builder of timm. Its file holds random weights in the layout that the
library's own constructor loads; the reference is the network that this constructor returns for
them. `results/published.json` says of each case whether `secateur.load_model` returns a network
with the same modules, settings and tensors, and the same outputs bit for bit. Outputs of networks
with more than `--outputs-of` million parameters are not compared. Cases that are already there are
kept.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.models import _builder
from torch import Tensor, nn
from torchvision.models import WeightsEnum

import secateur
from rows import ROOT, reason_of, revision, surroundings, write_json

RESULTS = ROOT / "results" / "published.json"
SCHEMA_VERSION = 1
SEED = 0
State = OrderedDict[str, Tensor]
OLD_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "torchvision:densenet": ((r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2"),),
    "torchvision:vit_b_16": ((r"mlp\.0\.", "mlp.linear_1."), (r"mlp\.3\.", "mlp.linear_2.")),
    "timm:densenet": ((r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2"),),
    "timm:convnext": (
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
        (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
        (r"conv_dw", "dwconv"),
        (r"mlp\.grn\.bias", "grn.beta"),
        (r"mlp\.grn\.weight", "grn.gamma"),
        (r"mlp\.fc", "pwconv"),
        (r"^head\.norm", "norm"),
        (r"^head\.fc", "head"),
    ),
    "timm:vgg": (
        (r"pre_logits\.fc1", "classifier.0"),
        (r"pre_logits\.fc2", "classifier.3"),
        (r"head\.fc", "classifier.6"),
    ),
    "timm:tresnet": ((r"(conv\d+)\.conv\.", r"\1.0."), (r"(conv\d+)\.bn\.", r"\1.1.")),
    "timm:rdnet": ((r"^stem\.", "stem.stem."),),
    "timm:efficientformer_": (
        (r"^stem\.conv1", "patch_embed.0"),
        (r"^stem\.norm1", "patch_embed.1"),
        (r"^stem\.conv2", "patch_embed.3"),
        (r"^stem\.norm2", "patch_embed.4"),
        (r"\.ls(\d)\.gamma", r".layer_scale_\1"),
        (r"head_dist", "dist_head"),
    ),
}
"""How a name of today became the name in the file that was published first, by network."""


@dataclass(frozen=True)
class Case:
    """A published layout."""

    network: str
    """As `secateur.load_model` takes it."""
    weights: str | None = None
    """torchvision's name of its published weights."""

    @property
    def name(self) -> str:
        """What the results call it."""
        return self.network if self.weights is None else f"{self.network} {self.weights}"


def cases() -> list[Case]:
    """Every builder of both libraries; of timm the first of each family, then the second, …."""
    listed = []
    for name in torchvision.models.list_models(module=torchvision.models):
        sizes: set[tuple[int, int]] = set()
        for entry in torchvision.models.get_model_weights(name):
            if not sizes or (name.startswith("vit_") and entry.meta["min_size"] not in sizes):
                listed.append(Case(f"torchvision:{name}", entry.name))
            sizes.add(entry.meta["min_size"])
    families: Counter[str] = Counter()
    turns = {}
    for name in timm.list_models():
        family = timm.models.model_entrypoint(name).__module__
        turns[name] = families[family]
        families[family] += 1
    return [*listed, *(Case(f"timm:{name}") for name in sorted(turns, key=lambda n: turns[n]))]


def million_parameters(case: Case) -> float:
    """Return the size of a network of timm, without building its tensors; 0 if that fails."""
    try:
        with torch.device("meta"):
            model = timm.create_model(case.network.removeprefix("timm:"))
    except Exception:  # some builders compute with their tensors
        return 0.0
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value for a block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def without_initialisation() -> Iterator[None]:
    """Leave out PyTorch's initial weights, which take longer than everything else here."""
    names = ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_")
    with ExitStack() as stack:
        for name in (*names, "xavier_normal_", "xavier_uniform_"):
            stack.enter_context(replaced(nn.init, name, lambda tensor, *_, **__: tensor))
        yield


class Loading(Exception):
    """Raised in place of loading, with the network that was about to be loaded."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model


def refuse(model: nn.Module, *_: Any, **__: Any) -> None:
    """Raise `Loading`: takes the place of a function that loads weights into `model`."""
    raise Loading(model)


def constructor(case: Case) -> Callable[[State], nn.Module]:
    """Return the library's own function from a published state dict to the network."""
    library, _, name = case.network.partition(":")
    if library == "timm":
        overlay = {"custom_load": False}
        return lambda state: timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay={**overlay, "state_dict": state}
        )
    entry = torchvision.models.get_model_weights(name)[str(case.weights)]

    def construct(state: State) -> nn.Module:
        with replaced(WeightsEnum, "get_state_dict", lambda *_, **__: duplicate(state)):
            model: nn.Module = torchvision.models.get_model(name, weights=entry)
        return model

    return construct


def published_state(case: Case, construct: Callable[[State], nn.Module]) -> State:
    """Return random weights as the constructor wants them, under the names of the first file."""
    library = case.network.partition(":")[0]
    loader = (_builder, "load_pretrained") if library == "timm" else (nn.Module, "load_state_dict")
    try:
        with replaced(loader[0], loader[1], refuse):
            construct(OrderedDict(none=torch.zeros(1)))
    except Loading as loading:
        state = OrderedDict(loading.model.state_dict())
        versions = getattr(loading.model.state_dict(), "_metadata", {})
    if case.network == "timm:inception_v3":  # torchvision's file, with its auxiliary head
        aux = torchvision.models.inception_v3(init_weights=False).AuxLogits.state_dict()
        state.update({f"AuxLogits.{key}": tensor for key, tensor in aux.items()})
    randomise(state)
    changes = next((OLD_NAMES[key] for key in OLD_NAMES if case.network.startswith(key)), ())
    if "densenet" in case.network:  # whose files are older than these counters
        for name in [name for name in state if name.endswith("num_batches_tracked")]:
            del state[name]
    renamed = OrderedDict((renamed_by(changes, key), tensor) for key, tensor in state.items())
    if not changes:  # the old files have no versions
        renamed._metadata = versions  # type: ignore[attr-defined]
    return renamed


def duplicate(state: State) -> State:
    """Return another dict of the same tensors and versions: loaders change theirs."""
    other = OrderedDict(state)
    other._metadata = getattr(state, "_metadata", {})  # type: ignore[attr-defined]
    return other


def renamed_by(changes: tuple[tuple[str, str], ...], name: str) -> str:
    """Return a name after all substitutions, one after the other."""
    for pattern, replacement in changes:
        name = re.sub(pattern, replacement, name)
    return name


def randomise(state: State) -> None:
    """Disturb the tensors in place, so that a tensor that is not loaded is missed."""
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.rand(1 << 16, generator=generator)
    for tensor in state.values():
        if tensor.is_floating_point():
            repeats = -(-tensor.numel() // len(noise))
            values = noise.repeat(repeats)[: tensor.numel()].view(tensor.shape)
            tensor.mul_(0.4 + 0.2 * values)  # so small that deep networks don't overflow
            if tensor.dim() < 2:
                tensor.add_(values, alpha=0.01)


def compare(case: Case, outputs_of: float) -> dict[str, Any]:
    """Return what `secateur.load_model` makes of a case; raise what goes wrong."""
    construct = constructor(case)
    state = published_state(case, construct)
    with without_initialisation():
        expected = construct(duplicate(state)).eval()
    classes = int(getattr(expected, "num_classes", 1000) or 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "published.pth"
        torch.save(state, path)
        del state
        with without_initialisation():
            model = secateur.load_model(case.network, path, num_classes=classes)
    for head in ("aux1", "aux2", "AuxLogits"):  # which serve training alone
        if hasattr(expected, head):
            delattr(expected, head)
            setattr(expected, head, None)
    tensors, others = expected.state_dict(), model.state_dict()
    if tensors.keys() != others.keys():
        raise ValueError(f"other names: {sorted(tensors.keys() ^ others.keys())[:3]}")
    different = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    if different:
        raise ValueError(f"other tensors: {different[:3]}")
    if repr(expected) != repr(model):
        raise ValueError("other modules or settings")
    millions = sum(tensor.numel() for tensor in tensors.values()) / 1e6
    has_outputs = millions <= outputs_of
    if has_outputs:
        images = torch.rand(1, *image_shape(case), generator=torch.Generator().manual_seed(SEED))
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(SEED)
            first = expected(images)
            torch.manual_seed(SEED)
            second = model(images)
        assert bool(torch.isfinite(first).all()), "outputs are not finite"
        if not torch.equal(first, second):
            raise ValueError(f"other outputs, by up to {float((first - second).abs().max()):.3g}")
    return {"outcome": "same", "outputs": has_outputs, "million_parameters": round(millions, 1)}


def image_shape(case: Case) -> tuple[int, int, int]:
    """Return the shape of images: of the published size where the network takes that alone."""
    library, _, name = case.network.partition(":")
    if library == "timm":
        settings = timm.models.get_pretrained_cfg(name)
        channels, height, width = settings.input_size if settings else (3, 224, 224)
        return channels, height, width
    entry = torchvision.models.get_model_weights(name)[str(case.weights)]
    (side,) = entry.transforms().crop_size
    if not name.startswith(("vit_", "maxvit")):
        side = 96
    return 3, side, side


def main() -> None:
    """Run the cases that are missing, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="pattern of names, such as 'timm:*'")
    parser.add_argument("--outputs-of", type=float, default=60, help="million parameters")
    parser.add_argument(
        "--largest", type=float, default=350, help="million parameters of timm's; larger: left out"
    )
    parser.add_argument("--again", action="store_true", help="run cases that are there already")
    arguments = parser.parse_args()
    content = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"cases": {}}
    results: dict[str, dict[str, Any]] = content["cases"]
    for case in cases():
        if not (
            arguments.again or is_missing(results.get(case.name), arguments.outputs_of)
        ) or not fnmatch.fnmatch(case.network, arguments.only):
            continue
        if case.weights is None and million_parameters(case) > arguments.largest:
            continue
        try:
            results[case.name] = compare(case, arguments.outputs_of)
        except Exception as error:  # whatever goes wrong is a finding
            results[case.name] = {"outcome": "different", "reason": reason_of(error)}
            print(case.name, reason_of(error), flush=True)
        write_json(RESULTS, summary(results))
    print(json.dumps(summary(results)["summary"], indent=1))


def is_missing(result: dict[str, Any] | None, outputs_of: float) -> bool:
    """Return whether a case is to be run: it is new, was different, or lacks outputs."""
    if result is None or result["outcome"] != "same":
        return True
    return not result["outputs"] and float(result["million_parameters"]) <= outputs_of


def summary(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the content of the result file."""
    counts: dict[str, Counter[str]] = {"torchvision": Counter(), "timm": Counter()}
    for name, result in results.items():
        count = counts[name.partition(":")[0]]
        count["cases"] += 1
        count["same"] += result["outcome"] == "same"
        count["outputs_compared"] += bool(result.get("outputs"))
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "python bench/published.py",
        "revision": revision(),
        "environment": surroundings("timm"),
        "summary": counts,
        "cases": dict(sorted(results.items())),
    }


if __name__ == "__main__":
    main()
