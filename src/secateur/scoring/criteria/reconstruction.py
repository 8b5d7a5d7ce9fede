"""Filters go one by one, and each time the remaining ones stand in as well as they can.

Used twice: over all positions it is a baseline from the literature, inside the regions of concepts
it is the default vote.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.errors import UsageError
from secateur.graph.patches import Window
from secateur.scoring.covariance import SecondMoments, quantize, quantization_unit
from secateur.scoring.criteria import FeatureBatch, Kernels, Need, Regions, DeferredUpdate
from secateur.scoring.criteria.kernels import l1, mean_over_producers
from secateur.scoring.criteria.votes import VoteSettings

POSITIONS = 16
"""Positions of each image that are looked at, spread evenly and differently in every image."""
MOST_VALUES = 4608
"""With larger patches (k²c) positions around a kernel are taken as unrelated."""
WEIGHT_UNITS = 16
"""Weights of positions are rounded to multiples of 1 / 16."""
RIDGE = 1e-3
"""Added to the diagonal of a covariance, as a multiple of its mean."""
NORM_WEIGHT = 3
"""Behind a batch norm the votes for a filter are multiplied by this power of the L1 norm of the
kernel that writes it.

Under weight decay that norm tells how much training held on to the filter, which activations do
not: a norm on the way brings them to whatever scale it has learnt. Chosen on validation images
(docs/explanation/criteria.md)."""
ROUNDS = 128
"""In a layer of more filters several go at a time, so that there are about so many rounds."""


class Reconstruction:
    """Place in the order in which filters go if each time those that are missed least go.

    Missed is what the layers that read the filters can't get from the remaining ones by least
    squares on patches: the layer-wise reconstruction of ThiNet (Luo et al., ICCV 2017, eq. 6),
    solved backwards as in Optimal Brain Surgeon (Hassibi and Stork, NIPS 1993, eq. 5).

    Without a `rule` every position counts, which is the baseline. With one it is an election in
    rounds, as in an instant runoff: the voters are the positions inside the regions of concepts. A
    voter's ballot is the square of what the readers would miss there of each filter; behind a batch
    norm it counts the more the larger the kernel is that writes the filter (`STANDING`). The filter
    with the fewest votes goes, and its votes pass on to those that stand in for it.
    """

    def __init__(self, rule: VoteSettings | None = None) -> None:
        self._rule = rule
        baseline: frozenset[Need] = frozenset({"maps", "usual"})
        election: frozenset[Need] = frozenset({"maps", "usual", "concepts"})
        self.needs: frozenset[Need] = baseline if rule is None else election
        self._parts: Mapping[str, Kernels] = {}
        self._windows: dict[str, Window] = {}
        self._units: dict[str, Tensor] = {}
        self._moments: dict[str, SecondMoments] = {}

    def reset(self, parts: Mapping[str, Kernels]) -> None:
        """Makes room for the products of each part."""
        self._parts = parts
        self._windows = {part: _window(kernels) for part, kernels in parts.items()}
        self._moments = {
            part: SecondMoments(self._windows[part].taps * kernels.filters)
            for part, kernels in parts.items()
        }

    def update(self, sight: FeatureBatch) -> DeferredUpdate | None:
        """Takes patches at some positions; their weights wait for the concepts."""
        assert sight.statistics is not None
        window = self._windows[sight.tap]
        if sight.tap not in self._units:
            self._units[sight.tap] = quantization_unit(sight.statistics).repeat(window.taps)
        rows, columns = window.positions(*sight.maps.shape[2:])
        positions = _spread(sight.indices, rows, columns)
        taken = window.patches(sight.maps, positions)  # [image, position, value]
        patches = quantize(taken, self._units[sight.tap], sight.tap).flatten(0, 1)
        moments, rule = self._moments[sight.tap], self._rule
        if rule is None:
            moments.update(patches)
            return None

        def vote(regions: Regions) -> None:
            inside = regions.masks_at((rows, columns)).flatten(2).float()  # [image, region, position]
            weights = torch.einsum("irp,ir->ip", inside, rule.weigh(regions.concepts).float())
            weights = (weights.gather(1, positions) * WEIGHT_UNITS).round()
            moments.update(patches, weights.flatten())

        return vote

    def state(self) -> Iterable[Tensor]:
        """See `Observer.state`."""
        return (tally for moments in self._moments.values() for tally in moments.state())

    def compute(self, part: str) -> Float[Tensor, "filter"]:
        """The places: the filter that goes first has 0."""
        kernels, window = self._parts[part], self._windows[part]
        covariance = self._moments[part].covariance(self._units[part])
        standing = None if self._rule is None else _norm_weights(part, kernels)
        order = eliminate(covariance, _consumers(kernels, window), kernels.filters, standing)
        places = torch.zeros(kernels.filters, dtype=torch.float64)
        places[torch.tensor(order)] = torch.arange(kernels.filters, dtype=torch.float64)
        return places

    def errors(self, part: str, ranking: Sequence[int]) -> Float[Tensor, "count"]:
        """What readers miss, squared and summed, when 0, 1, … up to all filters of a part go.

        `ranking` says which ones: the last goes first. Each time the others stand in as well as
        they can. No further pass is needed, whatever the ranking.
        """
        kernels, window = self._parts[part], self._windows[part]
        covariance = self._moments[part].covariance(self._units[part])
        return error_curve(covariance, _consumers(kernels, window), ranking)

    def mean(self, part: str) -> Float[Tensor, "filter"]:
        """Mean activations of a part's filters."""
        moments = self._moments[part].mean(self._units[part])
        return moments[self._centre(part)]

    def reconstruction(
        self, part: str, kept: Sequence[int]
    ) -> tuple[Float[Tensor, "filter filter"], Float[Tensor, "filter"]]:
        """Matrix and offset that give every filter of a part from those that are kept.

        These are the `channel` form of the refit: filters stand in for others at the same position.
        """
        centre = self._centre(part)
        covariance = self._moments[part].covariance(self._units[part])[centre, centre]
        mean = self.mean(part)
        index = torch.tensor(kept)
        inner = covariance[index][:, index] + _floor(covariance) * _identity(len(index))
        matrix = torch.zeros_like(covariance)
        matrix[:, index] = torch.linalg.solve(inner, covariance[index]).T
        matrix[index] = _identity(len(mean))[index]
        return matrix, mean - matrix @ mean

    def _centre(self, part: str) -> slice:
        """The values of a patch at its middle tap."""
        filters, taps = self._parts[part].filters, self._windows[part].taps
        return slice(taps // 2 * filters, (taps // 2 + 1) * filters)


def eliminate(
    covariance: Float[Tensor, "value value"],
    consumers: Float[Tensor, "output value"],
    filters: int,
    norm_weights: Float[Tensor, "filter"] | None = None,
) -> list[int]:
    """The order in which filters go if each time those that are missed least go.

    A filter has one value for each tap of a patch (`value = tap * filters + filter`). With W the
    readers' weights, refitted to the filters that are left, and P the inverse covariance of those,
    leaving filter s out costs tr(W_s P_ss^-1 W_s'); then W loses W_s P_ss^-1 P_s, and P loses
    P_s' P_ss^-1 P_s. The one with the smallest cost times its `standing` goes; between equal ones
    the filter with the larger number.
    """
    values = len(covariance)
    inverse = torch.linalg.inv(covariance + _floor(covariance) * _identity(values))
    weights = consumers.double().clone()
    own = torch.arange(values).reshape(-1, filters).T  # [filter, tap]
    left = list(range(filters))
    order: list[int] = []
    at_a_time = max(1, filters // ROUNDS)
    while left:
        places = own[left]
        blocks = inverse[places[:, :, None], places[:, None, :]]  # [filter, tap, tap]
        carried = weights.T[places]  # [filter, tap, output]
        costs = (carried * torch.linalg.solve(blocks, carried)).sum((1, 2))
        votes = (costs if norm_weights is None else costs * norm_weights[left]).tolist()
        ranked = sorted(range(len(left)), key=lambda n: (votes[n], -left[n]))
        going = [left[n] for n in ranked[:at_a_time]]
        order += going
        gone = own[going].flatten()
        passed = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        weights -= weights[:, gone] @ passed
        inverse -= inverse[:, gone] @ passed
        left = [number for number in left if number not in set(going)]
    return order


def error_curve(
    covariance: Float[Tensor, "value value"],
    consumers: Float[Tensor, "output value"],
    ranking: Sequence[int],
) -> Float[Tensor, "count"]:
    """The summed squared error of what readers get when 0, 1, … up to all filters go.

    Of `ranking` the last goes first; values are those of `eliminate`. With the filters in that
    order and L the Cholesky factor of their covariance, what the first ones can't tell of the
    others has the covariance L_rr L_rr', so leaving the filters from one on out costs the squares
    of the columns of (readers L) from its own on.
    """
    filters = len(ranking)
    values = len(covariance)
    own = torch.arange(values).reshape(-1, filters).T[torch.tensor(ranking)].flatten()
    system = covariance[own][:, own] + _floor(covariance) * _identity(values)
    factor = torch.linalg.cholesky(system)
    columns = (consumers.double()[:, own] @ factor).square().sum(0)
    by_filter = columns.reshape(filters, -1).sum(1)
    return torch.cat([by_filter.new_zeros(1), by_filter.flip(0).cumsum(0)])


def _identity(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def _floor(covariance: Tensor) -> Tensor:
    """What is added to the diagonal of a covariance."""
    return RIDGE * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)


def _norm_weights(part: str, kernels: Kernels) -> Float[Tensor, "filter"] | None:
    """What the votes for each filter are multiplied by; None where that is 1.

    That is so without a norm on the way, since then activations are as large as the kernels make
    them, and where no kernel writes a filter.
    """
    if not kernels.norm_scales:
        return None
    try:
        norms = mean_over_producers(l1, part, kernels)
    except UsageError:
        return None
    return (norms / norms.mean().clamp_min(torch.finfo(torch.float32).tiny)) ** NORM_WEIGHT


def _window(kernels: Kernels) -> Window:
    """The patches that filters are compared in: those of the first reader, if not too large."""
    window = kernels.consumers[0].window if kernels.consumers else Window((1, 1))
    return window if window.taps * kernels.filters <= MOST_VALUES else Window((1, 1))


def _consumers(kernels: Kernels, window: Window) -> Float[Tensor, "output value"]:
    """The weights of all readers on one window; taps of another one count as outputs."""
    rows = [torch.zeros(0, window.taps, kernels.filters)]
    for reader in kernels.consumers:
        weights = reader.weights
        if reader.window != window:
            centre = torch.zeros(weights.shape[0] * weights.shape[1], *rows[0].shape[1:])
            centre[:, window.taps // 2] = weights.flatten(0, 1)
            weights = centre
        rows.append(weights)
    return torch.cat(rows).flatten(1)


def _spread(
    numbers: Int[Tensor, "image"], rows: int, columns: int
) -> Int[Tensor, "image position"]:
    """Positions of each image, by its number alone.

    The points of an additive recurrence in two dimensions (Roberts, 2018, the R2 sequence).
    """
    count = min(POSITIONS, rows * columns)
    index = (numbers[:, None] * count + torch.arange(count)).double()
    row = ((0.5 + index * 0.7548776662466927) % 1 * rows).long()
    column = ((0.5 + index * 0.5698402909980532) % 1 * columns).long()
    return row * columns + column
