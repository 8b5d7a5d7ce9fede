"""Re-estimate the kernels on both sides of removed channels together.

The refit before (`layerwise`) estimates the kernels that produce a group's remaining channels
towards what those channels were in the original network. But what they were is not what serves
their consumers best, now that the other channels are gone. So the kernels that produce a group and
those that consume it are estimated once more, both for what the consumers put out:

    argmin over the kernels and offsets of E |y - f(x)|^2

where x is what the pruned network feeds the first of them, f the part of the pruned network from
there to the consumers' outputs, or to the residual sum that these go into, and y the value there in
the original network. If only a ReLU reads that value, errors that it hides don't count. No label is
needed.

f is linear in each kernel but not in all: it is linearised (Gauss-Newton), and the normal equations
are solved by a few steps of conjugate gradients, each one product with the Jacobian and one with
its transpose. They are preconditioned kernel by kernel with the covariance of its inputs and the
mean square of what reaches its outputs (the Kronecker factors of Martens and Grosse, ICML 2015).
Few steps keep the kernels near those before, as early stopping does. A step that does not lower the
error on the images that are held out is not taken.
"""

from __future__ import annotations

from collections.abc import Mapping

from secateur.graph.channel_ids import Layer
from secateur.graph.dependency import Removed
from secateur.graph.factorisation import Ranks
from secateur.graph.kept_channels import KeptChannels
from secateur.pruning.outcome import JointRefit
from secateur.pruning.refit.activation_cache import ActivationCache
from secateur.pruning.refit.gauss_newton import SegmentProblem
from secateur.pruning.refit.regression_targets import State
from secateur.pruning.refit.segments import Segment, find_segments
from secateur.scoring.batching import images_at_a_time

POSITIONS = 2**18
"""Positions that a group is estimated from, of as many images as have them…"""
MACS = 2**32
"""…and that so many multiply-accumulates suffice for, since each step is two passes through that
part of the network…"""
FEWEST_IMAGES, MOST_IMAGES = 16, 256
"""…but of so many images, rounded to whole batches."""


class JointRefitter:
    """Estimates the kernels around each group that lost channels, once the last one is refitted."""

    def __init__(
        self,
        kept: KeptChannels,
        removed: Removed,
        uses: Mapping[str, list[Layer]],
        state: State,
        cache: ActivationCache,
        *,
        rectified: bool,
        ranks: Ranks,
    ) -> None:
        """Estimate the kernels of groups in `removed`, from the batches that `cache` will hold.

        Groups between kernels that have a rank in `ranks` are left out. `uses` are the layers that
        use each kernel, in the order of execution. `rectified` says whether errors that a rectifier
        hides are left out.
        """
        self._kept, self._state, self._cache = kept, state, cache
        self._segments = [
            segment
            for segment in find_segments(kept, removed, uses, rectified=rectified)
            if not any(kernel.layer.layer.name in ranks for kernel in segment.kernels)
        ]
        shape = kept.dependencies.graph.image.meta["val"].shape
        self._batch_size = images_at_a_time(*(int(side) for side in shape[2:]))
        self._count = kept.dependencies.count_after(removed)
        self._begun: list[Segment] = []
        """Not yet at their end, in the order of execution."""

    def begins_at(self, weight: str) -> bool:
        """Return whether a kernel is the first of those around a group."""
        return any(segment.weights[0] == weight for segment in self._segments)

    def begin(self, weight: str) -> None:
        """Keep what the layer with a kernel reads, if it is the first around a group.

        The interpreters of the cached batches must not be past it.
        """
        beginning = [segment for segment in self._segments if segment.weights[0] == weight]
        self._begun += beginning
        for segment in beginning[:1]:
            for batch in self._cache:
                batch.full.advance(segment.first)
                batch.cut.advance(segment.first)
                for other in beginning:
                    batch.starts[other.group] = (batch.full.copy(), batch.cut.copy())

    def end(self, weight: str, images: int) -> JointRefit | None:
        """Estimate the kernels around a group if this is the last of them; return what it gained.

        `images` is their number in all processes. Where several groups end here the last one's
        gain is returned.
        """
        result = None
        for segment in [begun for begun in self._begun if begun.weights[-1] == weight]:
            wanted = min(images, self._images_for(segment))
            problem = SegmentProblem(segment, self._kept, self._state, self._cache, wanted)
            result = problem.solve()
            place = self._begun.index(segment)
            behind = self._begun[place + 1 :]
            del self._begun[place]
            for batch in self._cache:
                _, cut = batch.starts.pop(segment.group)
                if result.error_after == result.error_before:
                    continue
                for other in behind:
                    cut.advance(other.first)
                    batch.starts[other.group] = (batch.starts[other.group][0], cut.copy())
                cut.catch_up(batch.full)
                batch.cut = cut
        return result

    def _images_for(self, segment: Segment) -> int:
        """Return how many images a segment is estimated from: whole batches."""
        macs = max(1, sum(kernel.layer.layer.macs(self._count) for kernel in segment.kernels))
        fitting = min(-(-POSITIONS // segment.positions), MACS // macs)
        wanted = min(MOST_IMAGES, max(FEWEST_IMAGES, fitting))
        return max(1, wanted // self._batch_size) * self._batch_size
