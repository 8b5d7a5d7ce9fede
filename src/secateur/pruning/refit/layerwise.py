"""Re-estimates, in closed form, the kernels that read cut channels.

For a layer with kernel W that reads x, of which the channels S stay, the new kernel is

    W' = argmin E |y - W' x_S - b|^2 + ridge |W' - W_S|^2

(`patch_form`: x_S are k×k patches; `channel_form` regresses x on x_S instead). Layers are taken in
the order of execution: x_S is what the already pruned network feeds the layer and y what the
*original* network's layer gives, so that errors are corrected as they arise. Where the output goes
into a residual sum, y is what makes the sum right. No label and no gradient is needed.

A kernel that is used several times is estimated when it is met first, from all its uses, with what
the later ones read while it is as cut.

A departure from the paper's words: by default every layer from the first cut on is re-estimated,
not only those that lost inputs. The others read inputs that went astray as well, and can put part
of it right (docs/explanation/method.md has the figures).

The abstract of Alqahtani et al. (CVIU 2021) says only that new kernels are estimated from the
remaining channels. Least squares on sampled positions is what channel pruning (He et al., ICCV
2017, eq. 1) and ThiNet (Luo et al., ICCV 2017, eq. 7) solve as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx.node import Node

from secateur.config import RefitForm, RefitSection
from secateur.data import Batch, is_held_out
from secateur.data.splits import HELD_OUT_EVERY
from secateur.errors import DataError
from secateur.graph.channel_ids import Layer
from secateur.graph.dependency import DependencyGraph
from secateur.graph.interpreter import GraphInterpreter
from secateur.graph.network_graph import NetworkGraph, argument, operation_name
from secateur.graph.patches import PositionSampling
from secateur.pruning.plan import PruningPlan
from secateur.pruning.refit.activation_cache import ActivationCache, CachedBatch
from secateur.pruning.refit.candidates import LayerBatch, Regression
from secateur.pruning.refit.channel_regression import ChannelRegression
from secateur.pruning.refit.layers import KeptChannels, refit_layer
from secateur.pruning.refit.patch_regression import PatchRegression, patch_bytes
from secateur.pruning.refit.regression_targets import (
    RegressionTargets,
    State,
    TargetLayer,
    offset_place,
    target_layer,
)
from secateur.runtime import distributed
from secateur.runtime.module_state import tensors_of
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.scoring.batching import rebatch


@dataclass(frozen=True)
class LayerRefit:
    """What the refit of one kernel achieved, on calibration images held out of the fit.

    Every fifth image is (`data.is_held_out`); of fewer than five none, and errors are those of the
    fit.
    """

    layer: str
    error_cut: float
    """Squared error over the variance of what should come out, with the kernel as cut.

    Where only a rectifier reads it, both are those behind the rectifier.
    """
    error_refit: float
    """The same with the re-estimated kernel."""
    ridge: float | None
    """The chosen ridge; None where the kernel was left as cut."""
    note: str = ""
    """Why the kernel was left as cut, if it was."""
    form: RefitForm = "patch"
    """How it was estimated."""


def refit(
    model: nn.Module,
    smaller: nn.Module,
    dependencies: DependencyGraph,
    plan: PruningPlan,
    batches: Iterable[Batch],
    settings: RefitSection,
    *,
    seed: int,
    network_targets: list[dict[Node, Tensor]] | None = None,
    progress: ProgressCallback = no_progress,
) -> tuple[LayerRefit, ...]:
    """Re-estimates the kernels of `smaller`, the cut `model`, in place; what each layer gained.

    `batches` are the calibration images or this process's share of them; how they are cut into
    batches and spread over processes makes no difference but for rounding. Which positions are
    looked at depends on `seed` and on each image's number, which images are held out on that alone.

    `answers`, an empty list at first, spares later calls with the same model and batches the way
    through the original network, at the price of holding what its layers give for all of them.

    Raises `DataError` where there is no image.
    """
    generator = torch.Generator().manual_seed(seed)
    names = dependencies.graph.tensor_names.values()
    tensors = tensors_of(smaller)
    state = {name: tensors[name].clone() for name in names}
    full_state = tensors_of(model)
    remains = KeptChannels(dependencies, plan.removed)
    bound = settings.memory_mib * 2**20 // 2  # one half for activations, one for sums
    results: list[LayerRefit] = []
    with torch.inference_mode(), ActivationCache(bound) as parking:
        images = 0
        for batch, count in rebatch(batches):
            if network_targets is not None and len(network_targets) == len(parking):
                network_targets.append({})
            known = None if network_targets is None else network_targets[len(parking)]
            full = GraphInterpreter(
                dependencies.graph, full_state, batch.images, cached_outputs=known
            )
            cut = GraphInterpreter(dependencies.graph, state, batch.images, remains.sizes)
            parking.append(CachedBatch(full, cut, batch.indices[:count]))
            images += count
        images = sum(distributed.all_gather(images))
        if not images:
            raise DataError("no calibration images to re-estimate kernels from")
        uses: dict[str, list[Layer]] = {}
        for layer in dependencies.layers:
            uses.setdefault(layer.weight, []).append(layer)
        kept = dependencies.kept_indices(plan.removed)
        for layers in progress(uses.values(), "refitting layers", len(uses)):
            layer = layers[0]
            lost_inputs = 1 - layer.filter_dim in kept.get(layer.weight, {})
            upstream_changed = settings.layers == "downstream" and bool(results)
            if not lost_inputs and not upstream_changed:
                continue
            reason = _why_not(dependencies.graph, layers)
            if reason:
                results.append(LayerRefit(layer.name, 0.0, 0.0, None, reason))
                continue
            targets = [target_layer(refit_layer(layer, remains)) for layer in layers]
            place = offset_place(targets)
            consumers = [target.consumer for target in targets]
            estimate: Regression
            form: RefitForm
            if (
                settings.form == "patch"
                and consumers[0].has_patches
                and patch_bytes(consumers[0], state[layer.weight]) <= bound
            ):
                rectified = settings.rectified and all(target.rectified for target in targets)
                estimate, form = (
                    PatchRegression(consumers, state, place, rectified=rectified),
                    "patch",
                )
            else:
                estimate, form = ChannelRegression(consumers, full_state, state, place), "channel"
            visit = _Visit(
                targets,
                state,
                settings.positions,
                holds_out=images >= HELD_OUT_EVERY,
                generator=generator,
            )
            passes = estimate.passes
            for turn, (take_in, conclude) in enumerate(passes):
                for passage in parking:
                    looks = visit.layer_batches(passage, is_first=turn == 0)
                    for number, look in enumerate(looks):
                        take_in(number, look)
                    if turn == len(passes) - 1:
                        passage.notes = []
                conclude()
            found = estimate.choice()
            results.append(
                LayerRefit(layer.name, found.error_cut, found.error, found.ridge, form=form)
            )
    with torch.no_grad():
        for name in names:
            tensors[name].copy_(state[name])
    return tuple(results)


def _why_not(graph: NetworkGraph, layers: list[Layer]) -> str:
    """Why a kernel can't be estimated from what its uses read; empty if it can."""
    if layers[0].is_computed:
        return "its kernel is computed in the forward"
    if layers[0].weight not in graph.tensor_names.values():
        return "its kernel is no parameter"
    kernel = layers[0].node.args[1]
    assert isinstance(kernel, Node)
    uses = [layer.node for layer in layers]
    if any(user not in uses or user.args.count(kernel) > 1 for user in kernel.users):
        return "its kernel is read elsewhere, too"
    if len({(operation_name(use), argument(use, "groups", 1)) for use in uses}) > 1:
        return "its kernel is used in several ways"
    for use in uses:
        source = use.args[0]
        assert isinstance(source, Node)
        if source is not graph.image and source.op != "call_function":
            return "what it reads does not come from the images"
        bias = argument(use, "bias")
        if isinstance(bias, Node) and bias not in graph.tensor_names:
            return "its bias is computed in the forward"
        shapes = [each.meta["val"].shape for each in (source, use)]
        if any(shape[0] % graph.images for shape in shapes) or shapes[0][0] != shapes[1][0]:
            return "the first dimension of what it reads is not that of the images"
        if operation_name(use) != "linear" and len(shapes[0]) != kernel.meta["val"].dim():
            return "it reads maps without images"
    return ""


class _Visit:
    """What a kernel's uses meet, batch by batch; the first time the walks move on."""

    def __init__(
        self,
        targets: Sequence[TargetLayer],
        state: State,
        positions: int,
        *,
        holds_out: bool,
        generator: torch.Generator,
    ) -> None:
        self._targets = targets
        self._state = state
        self._positions = positions
        self._holds_out = holds_out
        self._starts = torch.rand(len(targets), generator=generator).tolist()

    def layer_batches(self, passage: CachedBatch, *, is_first: bool) -> Iterator[LayerBatch]:
        """What each use meets in the images of a batch."""
        for number, (target, start) in enumerate(zip(self._targets, self._starts, strict=True)):
            consumer = target.consumer
            cut = passage.cut if number == 0 else passage.cut.copy()
            cut.advance(consumer.node)
            inputs = cut.value(consumer.source)
            # Of one image there may be several in a row, such as the frames of a film.
            each = (
                consumer.source.meta["val"].shape[0] // consumer.remains.dependencies.graph.images
            )
            images = passage.indices
            rows = (images[:, None] * each + torch.arange(each)).flatten()
            spread = PositionSampling(rows, self._positions, start)
            chosen = spread.over(consumer.positions)
            originals = None
            if is_first:
                full = passage.full if number == 0 else passage.full.copy()
                full.advance(consumer.node)
                original = full.value(consumer.source)[: len(rows)]
                originals = consumer.remains.of(consumer.source, original, consumer.channel_dim)
                answer = target.at(full, cut, self._state, chosen)
                passage.notes.append((answer.wanted, answer.level, answer.scale))
            yield LayerBatch(
                inputs=inputs[: len(rows)],
                originals=originals,
                target=RegressionTargets(*passage.notes[number]),
                spread=spread,
                held_out=(is_held_out(images) & self._holds_out)
                .repeat_interleave(each)
                .to(inputs.device),
            )
