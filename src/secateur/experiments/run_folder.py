"""A run folder: written as a whole or not at all, and read without running anything in it.

`plan.json` is what was cut, `model.safetensors` the weights that are left, `manifest.json` names
the architecture and holds the hash of every file that loading depends on. There are two ways back:
`load` builds the architecture, replays the plan and loads the weights strictly; `load_program` runs
`program.json`, the network as a list of tensor operations, where its code is not at hand. Nothing
is unpickled or evaluated: see `manifest` and `program`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.errors import RunFolderError, TraceError, UsageError
from secateur.experiments.manifest import (
    CONSTANTS,
    MANIFEST,
    PLAN,
    PROGRAM,
    WEIGHTS,
    Contents,
    Manifest,
    hashes,
    read_contents,
    read_manifest,
    versions,
    write_manifest,
)
from secateur.experiments.program import Program, ProgramNetwork
from secateur.experiments.program_export import make_program
from secateur.graph.dependency import DependencyGraph
from secateur.models import user_code, zoo
from secateur.pipeline.result import Origin
from secateur.pruning.apply import apply_plan
from secateur.pruning.plan import PruningPlan
from secateur.runtime import safetensors_io
from secateur.runtime.atomic_io import replace_file, replacing_folder
from secateur.runtime.file_lock import lock_exclusively
from secateur.runtime.module_state import evaluating

REPORT, LOG, LATENCY, CHECKPOINTS = "report.html", "log.jsonl", "latency.json", "checkpoints"


@contextlib.contextmanager
def new_run_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder that becomes `folder`, which is held: see `writing.replacing_folder`.

    Raises `RunFolderError` where `folder` is in the way: a file, or not empty without `overwrite`,
    or holding something that is not a run.
    """
    check_free(folder, overwrite=overwrite)
    with replacing_folder(folder) as new:
        yield new


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Raises `RunFolderError` where a run can't be written to `folder`."""
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file, not a folder for a run")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise RunFolderError(f"{folder} is not empty: choose another folder or add --overwrite")
    if not is_run(folder):
        raise RunFolderError(f"{folder} holds something other than a run: it is not overwritten")


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run."""
    return (folder / PLAN).is_file()


def read_plan(folder: Path) -> PruningPlan:
    """The plan in a run folder; raises `RunFolderError` as `load` does."""
    return _plan(read_contents(folder))


def save(
    folder: str | Path,
    model: nn.Module,
    plan: PruningPlan,
    *,
    image_shape: tuple[int, int, int],
    architecture: str | None = None,
    prune_residual: bool = False,
    exclude: tuple[str, ...] = (),
    overwrite: bool = False,
) -> None:
    """Writes a folder from which `load` and `load_program` give `model` back, whole or not at all.

    `model` is what `apply_plan` returned, with any weights since; `image_shape` is `(rgb, height,
    width)` of the images that its dependency graph was made with, `prune_residual` and `exclude`
    how. `architecture` names the unpruned network as `load_model` takes it
    (`torchvision:resnet50`); without one `load` must be given the network. Raises `RunFolderError`
    where the folder is in the way (see `new_run_folder`) and `UsageError` where weights are not
    float32.
    """
    origin = Origin(architecture, image_shape, prune_residual, exclude)
    folder = Path(folder)
    with lock_exclusively(folder), new_run_folder(folder, overwrite=overwrite) as new:
        write(new, model, plan, origin)


def read_origin(folder: Path) -> Origin:
    """What the manifest of a run folder says of the unpruned network."""
    return _origin(read_manifest(folder))


def _origin(manifest: Manifest) -> Origin:
    return Origin(
        manifest.architecture, manifest.image_shape, manifest.prune_residual, manifest.exclude
    )


def write(folder: Path, model: nn.Module, plan: PruningPlan, origin: Origin) -> Manifest:
    """Writes what loading needs into an existing folder; the manifest that it wrote last.

    A network that has no program (see `make_program`) is written without one; the manifest says
    why. Raises `UsageError` where weights are not float32.
    """
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise UsageError(f"{name} is {tensor.dtype}: a run folder holds float32 networks")
    replace_file(folder / PLAN, plan.to_json())
    replace_file(folder / WEIGHTS, safetensors_io.to_bytes(tensors))
    example = torch.zeros(2, *origin.image_shape)
    no_program: str | None = None
    try:
        program = make_program(model, example)
        replace_file(folder / PROGRAM, program.to_json())
        if program.constants:
            replace_file(folder / CONSTANTS, safetensors_io.to_bytes(program.constants))
    except TraceError as error:
        no_program = str(error)
    with evaluating(model), torch.inference_mode():
        answers = model(example)
    manifest = Manifest(
        versions=versions(),
        architecture=origin.architecture,
        num_classes=answers.shape[1] if isinstance(answers, Tensor) else None,
        image_shape=origin.image_shape,
        prune_residual=origin.prune_residual,
        exclude=origin.exclude,
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
) -> nn.Module:
    """The pruned network of a run folder, in evaluation mode: the same module, with fewer filters.

    `architecture` is the unpruned network, with any weights: needed where the run was made from
    code of your own (`file.py:factory`), which a folder is not trusted to run; `load_program` does
    without. `dependencies` is that network's, needed where it was made with rules or a forward of
    your own. Raises `RunFolderError` where a file is missing, damaged, changed or does not fit the
    others, and `UsageError` where the network must be passed.
    """
    contents = read_contents(Path(folder))
    manifest = contents.manifest
    plan = _plan(contents)
    model = _unpruned(manifest) if architecture is None else architecture
    if dependencies is None:
        dependencies = _origin(manifest).build_dependency_graph(model)
    smaller = apply_plan(model, dependencies, plan)
    try:
        smaller.load_state_dict(_tensors(contents, WEIGHTS), strict=True)
    except RuntimeError as error:
        cause = str(error).splitlines()
        raise RunFolderError(
            f"the weights in {contents.folder} don't fit the plan: {cause[-1].strip()}"
        ) from error
    return smaller.eval()


def _plan(contents: Contents) -> PruningPlan:
    plan = PruningPlan.from_json(_text(contents, PLAN))
    if plan.hash != contents.manifest.plan_hash:
        raise RunFolderError(f"{contents.folder}: {PLAN} is another plan than {MANIFEST} says")
    return plan


def _unpruned(manifest: Manifest) -> nn.Module:
    if manifest.architecture is None or manifest.num_classes is None:
        raise UsageError(
            "the run does not name its architecture: pass the unpruned network, or use load_program"
        )
    return zoo.load(manifest.architecture, num_classes=manifest.num_classes, allow_code=False)


def load_program(folder: str | Path) -> nn.Module:
    """The pruned network of a run folder as a program, in evaluation mode, without its own code.

    It answers as the network that `load` gives, bit for bit where that keeps its weights in
    contiguous memory, and takes batches of any size. It is a list of tensor operations, for
    running, exporting and timing; to prune or train it further, use `load`. Raises
    `RunFolderError` as `load` does, and where the folder has no program.
    """
    contents = read_contents(Path(folder))
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

    That is its exported program where the network comes from a user's file or from memory.
    """
    architecture = read_manifest(folder).architecture
    if architecture is None or user_code.is_user_code(architecture):
        return load_program(folder)
    return load(folder)
