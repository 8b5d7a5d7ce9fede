"""Re-estimate, in closed form, the kernels that read removed channels, layer by layer.

For a layer with kernel W that reads x, of which the channels S stay, the new kernel is

    W' = argmin E |y - W' x_S - b|^2 + ridge |W' - W_S|^2

where x_S are the k×k patches under the kernel (`patch_regression`; `channel_regression` regresses x
on x_S instead). Layers are refitted in the order of execution: x_S is what the already pruned
network feeds the layer, and y is the output of the *original* network's layer, so that errors are
corrected as they arise. If the output goes into a residual sum, y is what makes the sum right. No
label and no gradient is needed.

A kernel that is used several times is estimated at its first use, from all uses. The later ones
then read inputs that were computed with the kernel as cut.

This departs from the paper in one point: by default every layer from the first cut on is refitted,
not only layers that lost inputs. The others read perturbed inputs as well, and refitting them
removes part of the error (docs/explanation/method.md has the figures).

The abstract of Alqahtani et al. (CVIU 2021) says only that new kernels are estimated from the
remaining channels. Least squares on sampled positions is what channel pruning (He et al., ICCV
2017, eq. 1) and ThiNet (Luo et al., ICCV 2017, eq. 7) solve as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.fx.node import Node

from secateur.config import RefitForm, RefitSection
from secateur.data import Batch, is_held_out
from secateur.data.splits import HELD_OUT_EVERY
from secateur.graph.channel_ids import Layer
from secateur.graph.dependency import DependencyGraph, Removed
from secateur.graph.factorisation import (
    Ranks,
    factorise,
    product,
    tensors_with_products,
    write_products,
)
from secateur.graph.interpreter import GraphInterpreter
from secateur.graph.kept_channels import KeptChannels
from secateur.graph.module_state import device_of, tensors_of
from secateur.graph.patches import PositionSampling
from secateur.graph.residual_branches import ResidualBranch, residual_branches
from secateur.graph.weight_norm import with_kernels
from secateur.models.task import SINGLE_LABEL, Task
from secateur.pruning.outcome import LayerRefit
from secateur.pruning.refit.activation_cache import ActivationCache, CachedBatch
from secateur.pruning.refit.candidates import LayerBatch, Regression
from secateur.pruning.refit.channel_regression import ChannelRegression
from secateur.pruning.refit.constants import ConstantEstimator
from secateur.pruning.refit.important_positions import make_importance
from secateur.pruning.refit.joint import JointRefitter
from secateur.pruning.refit.kernel_uses import uses_by_kernel, why_not_refitted
from secateur.pruning.refit.layers import RefitLayer, refit_layer
from secateur.pruning.refit.patch_regression import PatchRegression, RankLimit, count_rows
from secateur.pruning.refit.regression_targets import OffsetPlace, RegressionTargets, State
from secateur.pruning.refit.rows import row_numbers
from secateur.pruning.refit.target_layers import (
    TargetLayer,
    affine,
    offset_place,
    target_layer,
)
from secateur.runtime import distributed
from secateur.runtime.device import sums_device
from secateur.runtime.errors import DataError
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.scoring.batching import rebatch

LayerOutputs = dict[Node, Tensor]
"""Outputs of the original network's layers for one batch."""


FEWEST_POSITIONS = 8192
"""Positions of all images together that a layer is estimated from, where its maps have them."""


@dataclass(frozen=True, eq=False)
class RefitInputs:
    """A network, its cut copy, and what was cut."""

    model: nn.Module
    smaller: nn.Module
    dependencies: DependencyGraph
    """Dependency graph of `model`."""
    removed: Removed
    ranks: Ranks = field(default_factory=dict)
    """Convolutions of `smaller` that are two each, with the rank of their kernel."""
    dropped: Sequence[str] = ()
    """Residual branches that `smaller` has constants in place of."""


def refit(
    inputs: RefitInputs,
    batches: Iterable[Batch],
    settings: RefitSection,
    *,
    seed: int,
    task: Task = SINGLE_LABEL,
    layer_outputs: list[LayerOutputs] | None = None,
    progress: ProgressCallback = no_progress,
) -> tuple[LayerRefit, ...]:
    """Re-estimate the kernels of `inputs.smaller` in place; return what each layer gained.

    `batches` are the calibration images or this process's shard of them. Their division into
    batches and processes changes the result only by rounding. The sampled positions depend on
    `seed` and on each image's number; which images are held out depends on the number alone.
    `task` says what is compared of the output, if positions are drawn by importance.

    `layer_outputs`, an empty list in the first call, is filled with the outputs of the original
    network's layers. Passed again with the same model and batches it saves computing them, and
    takes the memory for all of them. Raises `DataError` if there is no image.
    """
    dependencies, device = inputs.dependencies, device_of(inputs.smaller)
    cache = ActivationCache(settings.memory_bytes // 2, device)
    kept = KeptChannels(dependencies, inputs.removed, _dropped_branches(inputs))
    tensors = tensors_with_products(inputs.smaller, inputs.ranks)
    norms = [norm for norm in dependencies.weight_norms if norm.direction in tensors]
    names = [name for name in dependencies.graph.tensor_names.values() if name in tensors]
    names += [branch.constant for branch in kept.dropped]
    state = with_kernels(norms, {name: tensors[name].clone() for name in names})
    full_state = with_kernels(norms, tensors_of(inputs.model))
    results: list[LayerRefit] = []
    importance = make_importance(kept, full_state, task, settings, seed)
    uses = uses_by_kernel(dependencies, kept.dropped)
    changed = _changed_kernels(inputs, kept, uses)
    is_joint = settings.joint and settings.layers == "downstream" and importance is None
    groups, rectified = (inputs.removed if is_joint else {}), settings.rectified
    joint = JointRefitter(kept, groups, uses, state, cache, rectified=rectified, ranks=inputs.ranks)
    places = [uses[w][0].node for w in uses if w in changed or joint.begins_at(w)]
    places += [branch.sum for branch in kept.dropped]
    first = min(places, key=dependencies.graph.nodes.index, default=None)
    with torch.no_grad(), cache:
        count = 0
        for batch, images in rebatch(batches):
            if layer_outputs is not None and len(layer_outputs) == len(cache):
                layer_outputs.append({})
            outputs = None if layer_outputs is None else layer_outputs[len(cache)]
            full, cut = _interpreters(kept, full_state, state, batch.images, outputs)
            _advance((full, cut), first)
            numbers = batch.indices[:images]
            positions = importance.positions(batch.images[:images], numbers) if importance else {}
            cache.append(CachedBatch(full, cut, numbers, positions))
            count += images
        if not (count := sum(distributed.all_gather(count))):
            raise DataError("no calibration images to re-estimate kernels from")
        refitter = _LayerRefitter(
            kept=kept,
            ranks=inputs.ranks,
            full_state=full_state,
            state=state,
            settings=settings,
            cache=cache,
            limit_bytes=settings.memory_bytes // 2,
            images=count,
            sums_device=sums_device(device),
            generator=torch.Generator().manual_seed(seed),
        )
        constants = ConstantEstimator(kept, state, cache)
        for weight, layers in progress(uses.items(), "refitting layers", len(uses)):
            constants.estimate_before(layers[0].node)
            joint.begin(weight)
            upstream_changed = settings.layers == "downstream" and bool(results)
            if weight in changed or upstream_changed:
                result = refitter.refit_kernel(layers)
                results.append(replace(result, joint=joint.end(weight, count)))
                for norm in norms:
                    state.update(norm.parts(state[norm.direction]))
        constants.estimate_before(None)
    _write(inputs, tensors, {name: state[name] for name in names})
    return tuple(results)


def _write(inputs: RefitInputs, tensors: State, values: State) -> None:
    """Write values into the tensors of the cut network, and kernels of lower rank into both."""
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)
    write_products(inputs.smaller, inputs.ranks, tensors)


def _interpreters(
    kept: KeptChannels,
    full_state: State,
    state: State,
    images: Tensor,
    outputs: LayerOutputs | None,
) -> tuple[GraphInterpreter, GraphInterpreter]:
    """Return the original and the cut network at the beginning of a pass."""
    graph, shown = kept.dependencies.graph, images.clone()  # not the memory of a larger batch
    full = GraphInterpreter(graph, full_state, shown, cached_outputs=outputs)
    shown = full.value(graph.image)  # one copy in another order of memory serves both
    return full, GraphInterpreter(graph, state, shown, kept.sizes, dropped=kept.dropped)


def _advance(interpreters: Iterable[GraphInterpreter], first: Node | None) -> None:
    """Advance to the first operation that matters, so that the images themselves are not held."""
    for interpreter in interpreters if first is not None else ():
        interpreter.advance(first)


def positions_of_image(settings: RefitSection, images: int) -> int:
    """Return how many positions of each image are used, if its maps have so many."""
    return max(settings.positions, -(-FEWEST_POSITIONS // images))


def _changed_kernels(
    inputs: RefitInputs, kept: KeptChannels, uses: dict[str, list[Layer]]
) -> frozenset[str]:
    """Return the kernels that lost inputs, or have a lower rank or more to do now."""
    indices = inputs.dependencies.kept_indices(inputs.removed)
    lost_inputs = (
        weight
        for weight, layers in uses.items()
        if 1 - layers[0].filter_dim in indices.get(weight, {})
    )
    of_lower_rank = (f"{name}.weight" for name in inputs.ranks)
    return frozenset([*lost_inputs, *of_lower_rank, *_kernels_around_dropped(kept, uses)])


def _kernels_around_dropped(
    kept: KeptChannels, uses: Mapping[str, Sequence[Layer]]
) -> Iterator[str]:
    """Yield the kernels that take over what dropped branches did, and the first one behind."""
    if not kept.dropped:
        return
    place = {node: number for number, node in enumerate(kept.dependencies.graph.nodes)}
    first = min(place[branch.sum] for branch in kept.dropped)
    has_come = False
    for weight, (layer, *_) in uses.items():
        target = target_layer(refit_layer(layer, kept))
        is_behind = place[layer.node] > first
        if target.goal is not target.value_node or (is_behind and not has_come):
            yield weight
        has_come |= is_behind


def _dropped_branches(inputs: RefitInputs) -> list[ResidualBranch]:
    if not inputs.dropped:
        return []
    branches = residual_branches(inputs.model, inputs.dependencies)
    return [branches[name] for name in branches if name in inputs.dropped]


@dataclass(frozen=True, eq=False)
class _LayerRefitter:
    """Refits one kernel after the other, in the order of execution."""

    kept: KeptChannels
    ranks: Ranks
    full_state: State
    """Tensors of the original network."""
    state: State
    """Tensors of the cut network; refitted kernels are written there."""
    settings: RefitSection
    cache: ActivationCache
    limit_bytes: int
    """Memory for the sums of a regression."""
    images: int
    """Calibration images of all processes."""
    sums_device: torch.device
    """Where regressions are computed, in float64."""
    generator: torch.Generator

    def refit_kernel(self, uses: list[Layer]) -> LayerRefit:
        """Re-estimate a kernel from all uses of it."""
        layer = uses[0]
        reason = why_not_refitted(self.kept.dependencies.graph, uses)
        if reason:
            return LayerRefit(layer.name, 0.0, 0.0, None, reason)
        targets = [target_layer(refit_layer(use, self.kept)) for use in uses]
        place = offset_place(targets)
        names = {use.weight for use in uses} | {target.layer.bias for target in targets}
        names |= {None if place is None else place.name}
        state = {name: self.state[name].to(self.sums_device) for name in names if name}
        regression, form = self._regression(targets, place, state)
        starts = torch.rand(len(targets), generator=self.generator).tolist()
        passes = regression.passes
        for number, (take_in, conclude) in enumerate(passes):
            for batch in self.cache:
                layer_batches = self._layer_batches(
                    targets,
                    starts,
                    batch,
                    is_first=number == 0,
                    with_originals=regression.reads_originals,
                )
                for use, layer_batch in enumerate(layer_batches):
                    take_in(use, layer_batch)
                if number == len(passes) - 1:
                    batch.targets = []
            conclude()
        choice = regression.choice()
        rank = self.ranks.get(layer.name)
        if rank is not None and form == "channel":
            state[layer.weight] = product(*factorise(state[layer.weight], rank))
        for name, tensor in state.items():
            self.state[name] = tensor.to(self.state[name].device)
        return LayerRefit(layer.name, choice.error_cut, choice.error, choice.ridge, form=form)

    def _regression(
        self, targets: Sequence[TargetLayer], place: OffsetPlace | None, state: State
    ) -> tuple[Regression, RefitForm]:
        """Return the regression in the form that the settings and the memory allow.

        `state` holds the layer's tensors in the cut network, where it writes the new ones.
        """
        layers = [target.layer for target in targets]
        limit = self._limit(targets[0])
        if self.settings.form == "patch" and layers[0].has_patches:
            kernel = state[layers[0].layer.weight]
            counts = count_rows(layers, kernel, self._rows_of(layers), self.limit_bytes)
            if counts.fits:
                rectified = self.settings.rectified and all(target.rectified for target in targets)
                regression = PatchRegression(
                    layers, state, place, counts, rectified=rectified, limit=limit
                )
                return regression, "patch"
        kernel = self.full_state[layers[0].layer.weight].to(self.sums_device)
        return ChannelRegression(layers, kernel, state, place), "channel"

    def _limit(self, target: TargetLayer) -> RankLimit | None:
        """Return the rank that a layer's kernel must have, if it is replaced by two."""
        rank = self.ranks.get(target.layer.layer.name)
        if rank is None:
            return None
        graph, filters = self.kept.dependencies.graph, target.layer.layer.weight
        scale = torch.ones(len(self.state[filters]))
        if target.norm is not None:
            scale, _ = affine(graph, self.state, target.norm)
        return RankLimit(rank, scale)

    @property
    def _held_out(self) -> int:
        """Images that are held out: none if there are too few."""
        return self.images // HELD_OUT_EVERY

    @property
    def _positions(self) -> int:
        return positions_of_image(self.settings, self.images)

    def _rows_of(self, layers: Sequence[RefitLayer]) -> tuple[int, int]:
        """Return how many rows are fitted to, and how many are held out."""
        an_image = sum(
            layer.rows_per_image * min(self._positions, layer.positions) for layer in layers
        )
        return (self.images - self._held_out) * an_image, self._held_out * an_image

    def _layer_batches(
        self,
        targets: Sequence[TargetLayer],
        starts: Sequence[float],
        batch: CachedBatch,
        *,
        is_first: bool,
        with_originals: bool,
    ) -> Iterator[LayerBatch]:
        """Yield inputs and targets of each use of a layer for the images of a batch.

        In the first pass the interpreters advance to the layer. `starts` are the offsets of the
        sampled positions.
        """
        is_image_held_out = is_held_out(batch.indices) & (self._held_out > 0)
        for number, (target, start) in enumerate(zip(targets, starts, strict=True)):
            layer = target.layer
            cut = batch.cut if number == 0 else batch.cut.copy()
            cut.advance(layer.node)
            inputs = cut.value(layer.source)
            rows_per_image = layer.rows_per_image
            rows = row_numbers(batch.indices, rows_per_image)
            chosen = batch.positions.get(layer.node)
            sampling = PositionSampling(rows, self._positions, start, chosen)
            originals = None
            if is_first:
                full = batch.full if number == 0 else batch.full.copy()
                full.advance(layer.node)
                if with_originals:
                    original = full.value(layer.source)[: len(rows)]
                    originals = layer.kept.select(layer.source, original, layer.channel_dim)
                positions = sampling.over(layer.positions)
                wanted = target.at(full, cut, self.state, positions)
                batch.targets.append((wanted.wanted, wanted.level, wanted.scale))
            is_row_held_out = is_image_held_out.repeat_interleave(rows_per_image)
            yield LayerBatch(
                inputs=inputs[: len(rows)].to(self.sums_device),
                originals=None if originals is None else originals.to(self.sums_device),
                targets=RegressionTargets(*batch.targets[number]).to(self.sums_device),
                sampling=sampling,
                held_out=is_row_held_out.to(self.sums_device),
            )
