"""Re-estimates, in closed form, the kernels that read cut channels.

For a layer with kernel W that reads x, of which the channels S stay, the new kernel is

    W' = argmin E |y - W' x_S - b|^2 + ridge |W' - W_S|^2

(`patch` form: x_S are k×k patches). Layers are taken in the order of execution: x_S is what the
already pruned network feeds the layer and y what the *original* network's layer gives, so that
errors are corrected as they arise. Where the output goes into a residual sum, y is what makes the
sum right. No label and no gradient is needed.

A departure from the paper's words: by default every layer from the first cut on is re-estimated,
not only those that lost inputs. The others read inputs that went astray as well, and can put part
of it right (docs/method.md has the figures).

The abstract of Alqahtani et al. (CVIU 2021) says only that new kernels are estimated from the
remaining channels. Least squares on sampled positions is what channel pruning (He et al., ICCV
2017, eq. 1) and ThiNet (Luo et al., ICCV 2017, eq. 7) solve as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.fx.node import Node

from secateur.channels import Layer, argument
from secateur.config import RefitSection
from secateur.data import Batch
from secateur.graph import NetworkGraph, Walk, operation_name, tensors_of
from secateur.least_squares import Gram
from secateur.patches import from_patch_order, in_patch_order, window_of
from secateur.plan import PruningPlan
from secateur.progress import Track, silent
from secateur.wiring import Wiring

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Ridge strengths to choose from, as multiples of the inputs' mean variance."""
HELD_OUT_EVERY = 5
"""Every fifth batch is held out of the fit to choose the ridge, and put back afterwards."""
MAX_INPUTS = 8192
"""Layers that read more values at a time are left as cut: their Gram matrix would not fit."""
SMALLEST_SCALE = 1e-3
"""A norm that scales a channel by less passes no correction back to the layer before it."""
MAX_ROW_VALUES = 2**24
"""Values of patches held at a time (64 MiB in float32)."""


@dataclass(frozen=True)
class LayerRefit:
    """What the refit of one layer achieved, on probe images held out of the fit.

    With fewer batches than `HELD_OUT_EVERY` none is held out, and errors are those of the fit.
    """

    layer: str
    error_cut: float
    """Squared error over the variance of the layer's original output, with the kernel as cut."""
    error_refit: float
    """The same with the re-estimated kernel."""
    ridge: float | None
    """The chosen ridge; None where the kernel was left as cut."""
    note: str = ""
    """Why the kernel was left as cut, if it was."""


def refit(
    model: nn.Module,
    smaller: nn.Module,
    wiring: Wiring,
    plan: PruningPlan,
    batches: Iterable[Batch],
    settings: RefitSection,
    *,
    seed: int,
    answers: list[dict[Node, Tensor]] | None = None,
    track: Track = silent,
) -> tuple[LayerRefit, ...]:
    """Re-estimates the kernels of `smaller`, the cut `model`, in place; what each layer gained.

    Output positions are drawn at random from every image, as many as `settings` says. The
    activations between the current layer and the next are held for every batch, and the Gram
    matrices in float64.

    `answers`, an empty list at first, spares later calls with the same model and batches the way
    through the original network, at the price of holding what its layers give for all of them.
    """
    generator = torch.Generator().manual_seed(seed)
    cut_state = {name: tensor.clone() for name, tensor in tensors_of(smaller).items()}
    full_state = tensors_of(model)
    with torch.inference_mode():
        sizes = wiring.sizes_after(plan.removed)
        walks = []
        for number, batch in enumerate(batches):
            if answers is not None and len(answers) == number:
                answers.append({})
            known = None if answers is None else answers[number]
            full = Walk(wiring.graph, full_state, batch.images, answers=known)
            walks.append((full, Walk(wiring.graph, cut_state, batch.images, sizes)))
        results: list[LayerRefit] = []
        kept = wiring.kept_indices(plan.removed)
        uses = [layer.weight for layer in wiring.layers]
        for layer in track(wiring.layers, "refitting layers", len(wiring.layers)):
            lost_inputs = 1 - layer.filter_dim in kept.get(layer.weight, {})
            upstream_changed = settings.layers == "downstream" and bool(results)
            if not lost_inputs and not upstream_changed:
                continue
            reason = _why_not(layer, cut_state, uses)
            if reason:
                results.append(LayerRefit(layer.name, 0.0, 0.0, None, reason))
                continue
            outputs = kept.get(layer.weight, {}).get(0)
            index = None if outputs is None else torch.from_numpy(outputs)
            problem = _Problem(wiring.graph, layer, cut_state, index)
            for number, (full, cut) in enumerate(walks):
                held_out = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
                problem.add(full, cut, settings.positions, generator, held_out=held_out)
            results.append(problem.solve())
    with torch.no_grad():
        for name, tensor in tensors_of(smaller).items():
            tensor.copy_(cut_state[name])
    return tuple(results)


def _why_not(layer: Layer, state: dict[str, Tensor], uses: list[str]) -> str:
    if layer.is_computed:
        return "its kernel is computed in the forward"
    inputs = state[layer.weight][0].numel()
    if uses.count(layer.weight) > 1:
        return "used several times in the network"
    if inputs > MAX_INPUTS:
        return f"reads {inputs} values at a time, more than {MAX_INPUTS}"
    if operation_name(layer.node) not in ("conv2d", "linear"):
        return f"no patches for {operation_name(layer.node)}"
    if argument(layer.node, "groups", 1) != 1:
        return "a depthwise or grouped convolution"
    return ""


class _Problem:
    """The least-squares problem of one layer."""

    def __init__(
        self,
        graph: NetworkGraph,
        layer: Layer,
        state: dict[str, Tensor],
        outputs: Tensor | None,
    ) -> None:
        self._layer = layer
        self._state = state
        self._outputs = outputs
        self._graph = graph
        node = layer.node
        self._source = node.args[0]
        self._is_linear = operation_name(node) == "linear"
        shape = state[layer.weight].shape
        self._fit = Gram(shape[1:].numel(), shape[0])
        self._held_out = Gram(shape[1:].numel(), shape[0])
        self._shift = _shift_name(graph, node)
        self._sum = _residual_sum(node)

    def add(
        self, full: Walk, cut: Walk, positions: int, generator: torch.Generator, *, held_out: bool
    ) -> None:
        """Adds what the layer reads in the cut network, and what it should answer, of a batch.

        Of a map that is so at sampled positions.
        """
        cut.advance(self._layer.node)
        assert isinstance(self._source, Node)
        inputs = cut.value(self._source)
        targets = full.step(self._layer.node)
        chosen = None
        if not self._is_linear:
            total = targets.shape[2] * targets.shape[3]
            chosen = torch.randperm(total, generator=generator)[:positions].sort().values
        wanted = _at(targets, chosen)  # [image, position, output]
        if self._outputs is not None:
            wanted = wanted.index_select(-1, self._outputs)
        elif self._sum is not None:
            wanted = self._towards_sum(self._sum, wanted, chosen, full.fork(), cut.fork())
        gram = self._held_out if held_out else self._fit
        if held_out:  # small errors are differences of large sums
            wanted = wanted.double()
        if chosen is None:
            rows = inputs.flatten(0, -2)
            gram.add(rows.double() if held_out else rows, wanted.flatten(0, -2))
            return
        window = window_of(self._layer.node, tuple(self._state[self._layer.weight].shape[2:]))
        step = max(1, MAX_ROW_VALUES // (self._fit.xx.shape[0] * len(chosen)))
        for some, answers in zip(inputs.split(step), wanted.split(step), strict=True):
            rows = window.take(some, chosen.expand(len(some), -1)).flatten(0, 1)
            gram.add(rows.double() if held_out else rows, answers.flatten(0, 1))

    def _towards_sum(
        self, residual: _ResidualSum, targets: Tensor, chosen: Tensor | None, full: Walk, cut: Walk
    ) -> Tensor:
        """Targets that make the residual sum right although its other summand went astray."""
        wanted = _at(full.step(residual.sum), chosen)
        cut.advance(residual.sum)
        wanted = wanted - _at(cut.value(residual.other), chosen)
        if residual.norm is None:
            return wanted
        scale, offset = _affine(self._graph, self._state, residual.norm)
        strong = scale.abs() > SMALLEST_SCALE
        return torch.where(strong, (wanted - offset) / scale.where(strong, 1.0), targets)

    def solve(self) -> LayerRefit:
        """Writes the best kernel into the state."""
        old = self._state[self._layer.weight]
        kernel = in_patch_order(old.double())
        bias = self._bias()
        variance = (self._check.yy / self._check.count).sum() - (
            (self._check.y / self._check.count).square().sum()
        )
        scale = float(variance.clamp_min(1e-30))
        error_cut = float(self._check.squared_error(kernel, bias).sum()) / scale
        best, best_error = None, error_cut
        fixed_bias = bias if self._shift is None else None
        for ridge in RIDGES:
            found = self._fit.ridge(kernel, ridge, fixed_bias)
            error = float(self._check.squared_error(*found).sum()) / scale
            if error < best_error:
                best, best_error = ridge, error
        if best is not None:
            self._fit.merge(self._held_out)
            new_kernel, new_bias = self._fit.ridge(kernel, best, fixed_bias)
            self._state[self._layer.weight] = from_patch_order(new_kernel, old.shape).to(old.dtype)
            self._write_bias(bias, new_bias)
        return LayerRefit(self._layer.name, error_cut, best_error, best)

    @property
    def _check(self) -> Gram:
        """What errors are measured on."""
        return self._held_out if self._held_out.count else self._fit

    def _bias(self) -> Tensor:
        """The layer's bias, zero where it has none."""
        node = self._layer.node
        source = node.args[2] if len(node.args) > 2 else None
        if isinstance(source, Node):
            return self._state[self._graph.tensor_names[source]].double()
        return torch.zeros(self._fit.xy.shape[1], dtype=torch.float64)

    def _write_bias(self, old: Tensor, new: Tensor) -> None:
        """Puts a new offset where the network has a place for one."""
        if self._shift is None:
            return
        name, sign = self._shift
        tensor = self._state[name]
        self._state[name] = (tensor.double() + sign * (new - old)).to(tensor.dtype)


def _at(
    value: Float[Tensor, "image ..."], chosen: Int[Tensor, "position"] | None
) -> Float[Tensor, "image ... channel"]:
    """A map at some positions, numbered row by row, as `[image, position, channel]`.

    Without positions the value is a linear layer's, whose channels come last already.
    """
    return value if chosen is None else value.flatten(2)[:, :, chosen].movedim(1, -1)


def _shift_name(graph: NetworkGraph, node: Node) -> tuple[str, int] | None:
    """Where an offset of the layer's output can go: its bias, or the norm that reads it alone.

    With the sign: a larger offset is a smaller running mean.
    """
    source = node.args[2] if len(node.args) > 2 else None
    if isinstance(source, Node):
        return graph.tensor_names[source], 1
    norm = next(iter(node.users))
    if len(node.users) == 1 and operation_name(norm) == "batch_norm":
        mean = norm.args[3]
        if isinstance(mean, Node) and len(mean.users) == 1:
            return graph.tensor_names[mean], -1
    return None


@dataclass(frozen=True)
class _ResidualSum:
    """The sum that a layer's output goes into, right away or through a norm."""

    sum: Node
    other: Node
    norm: Node | None


def _residual_sum(node: Node) -> _ResidualSum | None:
    norm = None
    following = list(node.users)
    if len(following) == 1 and operation_name(following[0]) == "batch_norm":
        norm = node = following[0]
        following = list(node.users)
        if norm.args[3] is None:  # it scales by each batch's own statistics
            return None
    if len(following) != 1 or operation_name(following[0]) != "add" or following[0].kwargs:
        return None
    summands = [source for source in following[0].args if isinstance(source, Node)]
    shapes = {tuple(source.meta["val"].shape[1:]) for source in summands}
    if len(summands) != 2 or len(shapes) != 1 or summands[0] is summands[1]:
        return None
    other = summands[0] if summands[1] is node else summands[1]
    return _ResidualSum(following[0], other, norm)


def _affine(graph: NetworkGraph, state: dict[str, Tensor], norm: Node) -> tuple[Tensor, Tensor]:
    """Scale and offset of a batch norm in evaluation mode."""
    weight, bias, mean, variance = (
        None if source is None else state[graph.tensor_names[source]]  # type: ignore[index]
        for source in norm.args[1:5]
    )
    assert mean is not None
    assert variance is not None
    epsilon = norm.args[7]
    assert isinstance(epsilon, float)
    scale = (variance + epsilon).rsqrt()
    scale = scale if weight is None else scale * weight
    offset = -mean * scale
    return scale, offset if bias is None else offset + bias
