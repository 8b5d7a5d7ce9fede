"""The unpruned network of a run folder, if it can be had without running a stranger's code."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import nn

from secateur.config import RunConfig
from secateur.data import DataSet
from secateur.experiments.manifest import read_manifest
from secateur.experiments.run_folder import OWN_FUNCTIONS, read_origin, read_plan, unpruned
from secateur.experiments.user_code_keys import check_original_named
from secateur.graph.forward import with_forward, with_inputs
from secateur.graph.module_state import tensors_of
from secateur.models import user_code, zoo
from secateur.models.reparameterize import reparameterized
from secateur.pipeline.inputs import load_inputs
from secateur.runtime.errors import SecateurError
from secateur.runtime.hashing import weights_hash


def load_original(
    run: Path, config: RunConfig, named: Collection[str]
) -> tuple[tuple[DataSet, nn.Module] | None, str]:
    """Return the data and the network before a run, or None and why not.

    `config` is the run's, with the names that network and data have now, and `named` the keys that
    the user has set. Raises `UsageError` if another network is named than the run's, and what
    `load_inputs` raises if the user has named the network or its weights.
    """
    name, forward = config.model.name, config.model.forward
    reason = _not_run(
        run,
        name if "model.name" in named else None,
        forward if "model.forward" in named else None,
    )
    if reason:
        return None, reason
    try:
        dataset, original = load_inputs(config)
    except SecateurError as error:
        if {"model.name", "model.weights"} & set(named):
            raise
        return None, str(error)
    if read_plan(run).weights not in (None, weights_hash(tensors_of(original))):
        source = config.model.weights or config.model.name
        return None, f"{source} holds other weights now (--weights FILE names those of the run)"
    return (dataset, original), ""


def untrained_original(
    run: Path, name: str | None, forward: str | None
) -> tuple[nn.Module | None, str]:
    """Return the network before a run with any weights, to be timed, or None and why not.

    Its blocks are folded if those of the run's network were. `name` and `forward` are the network
    and the function that the user has named, if any: see `load_original`.
    """
    reason = _not_run(run, name, forward)
    if reason:
        return None, reason
    manifest = read_manifest(run)
    model = unpruned(manifest) if name is None else zoo.load(name, num_classes=manifest.num_classes)
    if manifest.reparameterized:
        model = reparameterized(model)
    if forward is not None:
        model = with_forward(model, user_code.find(forward, "function"))
    return with_inputs(model, read_origin(run).inputs), ""


def _not_run(run: Path, name: str | None, forward: str | None) -> str:
    """Return why the code of the unpruned network is not run here, and what to do; or nothing.

    `name` and `forward` are what the user has named.
    """
    manifest = read_manifest(run)
    architecture, function = manifest.architecture, manifest.forward
    check_original_named(run, architecture, name)
    if name is None and architecture is None:
        return "it was passed from Python (--model path/to/file.py:function names its code)"
    if name is None and architecture is not None and user_code.is_user_code(architecture):
        return f"its code is not run unless named, --model {architecture}"
    if forward is None and function is not None and not function.startswith(OWN_FUNCTIONS):
        return f"its function is not run unless named, --forward {function}"
    return ""
