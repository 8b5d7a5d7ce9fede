"""A run folder: written as a whole or not at all, and read without running anything in it.

`plan.json` lists the removed filters, `model.safetensors` holds the remaining weights, and
`manifest.json` names the architecture and holds the hash of every file that loading depends on.
There are two ways to load a network: `load` builds the architecture, applies the plan and loads the
weights strictly; `load_program` runs `program.json`, the network as a list of tensor operations,
and needs none of the network's code. Nothing is unpickled or evaluated: see `manifest` and
`program`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.kept_classes import KeptClasses
from secateur.engines.flat_network import run_flat
from secateur.engines.output_structure import names_of
from secateur.experiments.manifest import (
    CONSTANTS,
    HASHED,
    MANIFEST,
    PLAN,
    PROGRAM,
    WEIGHTS,
    Contents,
    Manifest,
    SeveralInputs,
    hashes,
    read_contents,
    read_manifest,
    versions,
    write_manifest,
)
from secateur.experiments.program import Program, ProgramNetwork
from secateur.experiments.program_export import make_program
from secateur.graph.build import build_dependency_graph, traceable_forward
from secateur.graph.dependency import DependencyGraph
from secateur.graph.forward import (
    forward_of,
    name_of,
    with_forward,
    with_inputs,
    without_forward,
)
from secateur.graph.module_state import copy_of, device_of
from secateur.graph.network_graph import Forward
from secateur.graph.wrappers import unwrapped
from secateur.integrations import hub
from secateur.models import published, user_code, zoo
from secateur.models.examine import logits_of
from secateur.models.reparameterize import reparameterized as fold
from secateur.models.state_dict import load_state
from secateur.pipeline.result import RESULT
from secateur.pruning.apply import apply_plan
from secateur.pruning.head import cut_head
from secateur.pruning.plan import PruningPlan
from secateur.runtime import safetensors_io
from secateur.runtime.atomic_io import replace_file, replacing_folder
from secateur.runtime.device import CPU
from secateur.runtime.errors import RunFolderError, TraceError, UsageError
from secateur.runtime.file_lock import lock_exclusively
from secateur.runtime.packed_inputs import Inputs, parameters_of, read_inputs

ENGINE_TIMES = "engine_times.json"
"""See `experiments.engine_times`."""
REPORT, LOG, LATENCY, CHECKPOINTS = "report.html", "log.jsonl", "latency.json", "checkpoints"
OWN_FUNCTIONS = "secateur."
"""What the names of secateur's own functions begin with, such as `logits_of`."""
TRANSFORM = "transform_input"
"""Attribute of torchvision's GoogLeNet and Inception v3: see `published.INPUT_TRANSFORMED`."""

ImageShape = Sequence[int] | Sequence[Sequence[int]] | Mapping[str, Sequence[int]]
"""Shape of an image, or of each input of a network that takes several."""


@dataclass(frozen=True)
class Origin:
    """What it takes to cut the unpruned network again."""

    architecture: str | None
    """As `load_model` takes it; None if only the user can build it."""
    image_shape: tuple[int, ...]
    """Shape of an image, such as `(rgb, height, width)`; of all `inputs` in one tensor."""
    prune_residual: bool = False
    exclude: tuple[str, ...] = ()
    num_classes: int | None = None
    """Classes that the architecture is built with; None if the network's outputs tell."""
    inputs: Inputs | None = None
    """The inputs of a network that takes several."""
    forward: str | None = None
    """What the function that the network runs through is called, if not by its name in Python."""
    kept_classes: KeptClasses | None = None
    """The classes that its head is cut to first; None: all."""
    reparameterized: bool = False
    """Whether the blocks of the unpruned network were folded before the cut."""

    def unpacked(self, batch: Tensor) -> Tensor | Sequence[Tensor] | Mapping[str, Tensor]:
        """Return a batch `[image, …]` as `export_onnx` takes it: a tensor, or several inputs."""
        if self.inputs is None:
            return batch
        tensors = self.inputs.unpack(batch)
        return dict(zip(self.inputs.names, tensors, strict=True)) if self.inputs.names else tensors

    def cut_head(self, model: nn.Module) -> nn.Module:
        """Return the unpruned network with the outputs of the kept classes only."""
        assert self.kept_classes is not None
        network = with_inputs(model, self.inputs)
        return cut_head(network, torch.zeros(2, *self.image_shape), self.kept_classes.numbers)

    def build_dependency_graph(self, model: nn.Module) -> DependencyGraph:
        """Build the dependency graph of the unpruned network as it was built for the plan."""
        example = torch.zeros(2, *self.image_shape)
        return build_dependency_graph(
            with_inputs(model, self.inputs),
            example,
            prune_residual=self.prune_residual,
            exclude=self.exclude,
        )


@contextlib.contextmanager
def new_run_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder that takes the place of `folder`, which is locked: see `replacing_folder`.

    Raises `RunFolderError` if `folder` is a file, or holds something that is not a run, or is
    not empty and `overwrite` is not set.
    """
    check_free(folder, overwrite=overwrite)
    with replacing_folder(folder) as new:
        yield new


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Raise `RunFolderError` if a run can't be written to `folder`."""
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file, not a folder for a run")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise RunFolderError(f"{folder} is not empty: choose another folder or add --overwrite")
    if not is_run(folder):
        raise RunFolderError(f"{folder} holds something other than a run: it is not overwritten")


def is_run(folder: Path) -> bool:
    """Return whether the folder holds a run."""
    return (folder / PLAN).is_file()


def read_plan(folder: Path) -> PruningPlan:
    """Read the plan in a run folder; raise `RunFolderError` as `load` does."""
    return _plan(read_contents(folder))


def save(
    folder: str | Path,
    model: nn.Module,
    plan: PruningPlan,
    *,
    image_shape: ImageShape,
    architecture: str | None = None,
    prune_residual: bool = False,
    exclude: tuple[str, ...] = (),
    forward: Forward | None = None,
    reparameterized: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a folder from which `load` and `load_program` return `model`.

    `model` is what `apply_plan` returned; it may have been trained since. `image_shape`, such as
    `(rgb, height, width)`, `prune_residual`, `exclude` and `forward` are what the dependency graph
    was built with. `architecture` names the unpruned network as `load_model` takes it
    (`torchvision:resnet50`); without it `load` must be given the network. Of a network with several
    inputs `image_shape` holds the shape of each, `((3, 32, 32), (8,))` or a dict of them. Of
    `forward` the name is kept: `load` must be given the function. Say `reparameterized=True` if you
    have folded the branches of its blocks before the cut, as `timm.utils.reparameterize_model`
    does: then `load` folds those of the unpruned network. Raises `RunFolderError` if the folder
    can't be taken (see `new_run_folder`) and `UsageError` if weights are not float32.

    >>> import secateur, tempfile, torch
    >>> model = secateur.load_model("resnet20", num_classes=10, seed=0)
    >>> dependencies = secateur.build_dependency_graph(model, torch.rand(2, 3, 32, 32))
    >>> scores = {name: torch.arange(len(group)) for name, group in dependencies.groups.items()}
    >>> plan = secateur.make_plan(scores, dependencies, secateur.Budget("macs", 0.5), "mine")
    >>> smaller = secateur.apply_plan(model, dependencies, plan)
    >>> folder = tempfile.mkdtemp()
    >>> save(folder, smaller, plan, image_shape=(3, 32, 32), architecture="resnet20")
    >>> images = torch.rand(1, 3, 32, 32)
    >>> torch.equal(load(folder)(images), smaller.eval()(images))
    True
    """
    model, folder = unwrapped(model), Path(folder)
    example, inputs = read_inputs(_zeros(image_shape), parameters_of(model, forward))
    origin = Origin(
        architecture,
        tuple(example.shape[1:]),
        prune_residual,
        exclude,
        inputs=inputs,
        reparameterized=reparameterized,
    )
    network = with_inputs(with_forward(model, forward or traceable_forward(model)), inputs)
    with lock_exclusively(folder), new_run_folder(folder, overwrite=overwrite) as new:
        write(new, network, plan, origin)


def _zeros(shape: ImageShape) -> Any:
    """Return a batch of black images, or of each input."""
    if isinstance(shape, Mapping):
        return {name: torch.zeros(2, *part) for name, part in shape.items()}
    if shape and all(isinstance(part, Sequence) for part in shape):
        return tuple(torch.zeros(2, *part) for part in shape if isinstance(part, Sequence))
    return torch.zeros(2, *(size for size in shape if isinstance(size, int)))


def read_origin(folder: Path) -> Origin:
    """Read what the manifest of a run folder says of the unpruned network."""
    return _origin(read_manifest(folder))


def _origin(manifest: Manifest) -> Origin:
    several = manifest.inputs
    return Origin(
        manifest.architecture,
        manifest.image_shape,
        manifest.prune_residual,
        manifest.exclude,
        manifest.num_classes,
        None if several is None else Inputs(several.shapes, several.passing, several.names),
        kept_classes=manifest.kept_classes,
        reparameterized=manifest.reparameterized,
    )


def write(folder: Path, model: nn.Module, plan: PruningPlan, origin: Origin) -> Manifest:
    """Write what loading needs into an existing folder, and return the manifest.

    A network that can't be written as a program (see `make_program`) is saved without one, and the
    manifest says why. Raises `UsageError` if weights are not float32.
    """
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise UsageError(f"{name} is {tensor.dtype}: a run folder holds float32 networks")
    replace_file(folder / PLAN, plan.to_json())
    replace_file(folder / WEIGHTS, safetensors_io.to_bytes(tensors))
    if device_of(model) != CPU:
        model = copy_of(model, share_tensors=False).to(CPU)
    model = with_inputs(model, origin.inputs)
    example = torch.zeros(2, *origin.image_shape)
    no_program: str | None = None
    try:
        program = make_program(model, example)
        replace_file(folder / PROGRAM, program.to_json())
        if program.constants:
            replace_file(folder / CONSTANTS, safetensors_io.to_bytes(program.constants))
    except TraceError as error:
        no_program = str(error)
    outputs: dict[str, tuple[int, ...]] | None = None
    num_classes = origin.num_classes
    with contextlib.suppress(Exception):  # fails where `forward` is missing: there is no program
        tensors_of_two, structure = run_flat(model, example)
        shapes = [tuple(tensor.shape[1:]) for tensor in tensors_of_two]
        if structure != {"tensor": 0}:
            outputs = dict(zip(names_of(structure), shapes, strict=True))
        elif origin.kept_classes is not None:
            num_classes = origin.kept_classes.of
        elif shapes[0]:
            is_classifier = math.prod(shapes[0][1:]) == 1
            if is_classifier or (num_classes is None and origin.architecture is not None):
                num_classes = shapes[0][0]
    several = None if origin.inputs is None else SeveralInputs(**vars(origin.inputs))
    manifest = Manifest(
        versions=versions(),
        architecture=origin.architecture,
        num_classes=num_classes,
        kept_classes=origin.kept_classes,
        image_shape=origin.image_shape,
        inputs=several,
        outputs=outputs,
        transform_input=getattr(model, TRANSFORM, False) is True,
        prune_residual=origin.prune_residual,
        exclude=origin.exclude,
        forward=origin.forward or name_of(forward_of(model)),
        reparameterized=origin.reparameterized,
        plan_hash=plan.hash,
        no_program=no_program,
        files=hashes(folder),
    )
    write_manifest(folder, manifest)
    return manifest


def load(
    folder: str | Path,
    *,
    architecture: nn.Module | None = None,
    dependencies: DependencyGraph | None = None,
    forward: Forward | None = None,
) -> nn.Module:
    """Load the pruned network of a run folder, in evaluation mode.

    It is a module of the same class as the unpruned network, with fewer filters. `folder` may be a
    repository on the Hugging Face Hub, `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION` (extra
    `hub`), of which only the files of a run are fetched. `architecture` is the unpruned network,
    with any weights. Pass it if the run was made from your own code (`file.py:factory`), which a
    folder is not trusted to run, or use `load_program`. Pass `dependencies` if you built the
    dependency graph with your own rules, and `forward` if the run was made with one. If the run
    keeps some classes only, the head of `architecture` is cut to them here, unless you pass
    `dependencies`: then it must be cut already. Raises `RunFolderError` if a file is missing,
    damaged, changed or does not fit the others, `UsageError` if the network or `forward` must be
    passed, and `HubError` if the repository can't be read.
    """
    contents = _read(folder)
    manifest = contents.manifest
    plan = _plan(contents)
    origin = _origin(manifest)
    model = unpruned(manifest) if architecture is None else architecture
    if manifest.reparameterized:
        model = fold(model)
    if dependencies is None:
        forward = forward or _known_forward(manifest, contents.folder, model)
        try:
            if origin.kept_classes is not None:
                model = without_forward(origin.cut_head(with_forward(model, forward)))
            dependencies = origin.build_dependency_graph(with_forward(model, forward))
        except TraceError as error:
            if forward is not None:
                raise
            raise TraceError(f"{error}; if the run was made with forward=, pass it here") from error
    smaller = apply_plan(model, dependencies, plan)
    try:
        load_state(smaller, _tensors(contents, WEIGHTS))
    except RuntimeError as error:
        cause = str(error).splitlines()
        raise RunFolderError(
            f"the weights in {contents.folder} don't fit the plan: {cause[-1].strip()}"
        ) from error
    return smaller.eval()


def _read(folder: str | Path) -> Contents:
    """Read the files of a run folder, which may lie on the Hub."""
    if isinstance(folder, str) and folder.startswith(hub.SCHEME):
        folder = hub.download(hub.parse_address(folder), {*HASHED, MANIFEST})
    return read_contents(Path(folder))


def fetched(folder: Path) -> Path:
    """Return a run folder, or a copy of it if its path is an address on the Hub, `hf://OWNER/NAME`.

    The copy lies in the cache of `huggingface_hub`: nothing is to be written there. Raises
    `HubError` if it can't be read.
    """
    address = hub.address_in(folder)
    return folder if address is None else hub.download(address, {*HASHED, MANIFEST, RESULT})


def _plan(contents: Contents) -> PruningPlan:
    plan = PruningPlan.from_json(_text(contents, PLAN))
    if plan.hash != contents.manifest.plan_hash:
        raise RunFolderError(f"{contents.folder}: {PLAN} is another plan than {MANIFEST} says")
    return plan


def unpruned(manifest: Manifest) -> nn.Module:
    """Return the unpruned network of a run with untrained weights, as it was before any folding.

    Raises `UsageError` if only the user can build it.
    """
    if manifest.architecture is None:
        raise UsageError(
            "the run does not name its architecture: pass the unpruned network, or use load_program"
        )
    model = zoo.load(manifest.architecture, num_classes=manifest.num_classes, allow_code=False)
    published.set_image_size(model, manifest.image_shape[1])
    if hasattr(model, TRANSFORM):
        setattr(model, TRANSFORM, manifest.transform_input)
    return model


def _known_forward(manifest: Manifest, folder: Path, model: nn.Module) -> Forward | None:
    """Return the function that the network runs through, if it is one of secateur's own.

    Raises `UsageError` if it is the user's.
    """
    if manifest.forward is None:
        return None
    for known in (logits_of, traceable_forward(unwrapped(model))):
        if manifest.forward == name_of(known):
            return known
    raise UsageError(
        f"the run in {folder} was made with forward={manifest.forward}: pass that function, "
        "secateur.load(folder, architecture=model, forward=…), or use load_program"
    )


def load_program(folder: str | Path) -> nn.Module:
    """Load the pruned network of a run folder as a program, in evaluation mode.

    A program is a list of tensor operations, to run, export or time; the code that defines the
    network is not needed. To prune or train the network further, use `load`. The outputs equal
    those of the network that `load` returns, bit for bit if its weights lie in contiguous memory,
    for batches of any size. `folder` is as for `load`. Raises `RunFolderError` as `load` does, and
    if the folder has no program.
    """
    contents = _read(folder)
    if PROGRAM not in contents.files:
        reason = contents.manifest.no_program or f"{MANIFEST} lists none"
        raise RunFolderError(f"{contents.folder} has no program: {reason}")
    constants = _tensors(contents, CONSTANTS) if CONSTANTS in contents.files else {}
    program = Program.from_json(_text(contents, PROGRAM), constants)
    return ProgramNetwork(program, {**constants, **_tensors(contents, WEIGHTS)})


def _text(contents: Contents, name: str) -> str:
    try:
        return contents.files[name].decode("utf-8")
    except UnicodeDecodeError as error:
        raise RunFolderError(f"{contents.folder / name} is not text: {error}") from error


def _tensors(contents: Contents, name: str) -> dict[str, Tensor]:
    try:
        return safetensors_io.from_bytes(contents.files[name])
    except ValueError as error:
        raise RunFolderError(f"{contents.folder / name} can't be read: {error}") from error


def load_pruned(folder: Path) -> nn.Module:
    """Return the pruned network of a run folder without running code of the user's.

    That is its exported program if the network, or the function that it runs through, comes from a
    user's file or from memory.
    """
    manifest = read_manifest(folder)
    is_own = manifest.architecture is None or user_code.is_user_code(manifest.architecture)
    if is_own or not (manifest.forward or OWN_FUNCTIONS).startswith(OWN_FUNCTIONS):
        return load_program(folder)
    return load(folder)
