"""Test which networks can be pruned to half of their MACs, by secateur and by Torch-Pruning.

    python bench/coverage.py [--only PATTERN] [--tool both]

Each network of `zoo.py` is pruned in its own process and then added to `results/coverage.json`.
Networks of other packages than torchvision and timm go through all of `secateur.prune`, with refit.
Rows that are already there are kept, so the bench can be interrupted. Finally
docs/reference/coverage.md is written; `--tables` does only that.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import shlex
import statistics
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import peer
import secateur
import third_party
from rows import (
    ROOT,
    Note,
    Row,
    bench_parser,
    put_row,
    read_rows,
    reason_of,
    record,
    revision,
    run_child,
    surroundings,
    versions,
)
from secateur.config import Budget, ScoreSection
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import DependencyGraph
from secateur.models.divergence import relative_error
from secateur.pruning.apply import apply_plan
from secateur.pruning.equivalence import masked_network
from secateur.pruning.plan import PruningPlan, make_plan
from secateur.runtime.errors import TargetError
from secateur.runtime.packed_inputs import parameters_of, read_inputs
from secateur.scoring import criteria
from secateur.scoring.scores import score_filters
from zoo import Batch, Member, build, members, outputs_of, random_inputs

RESULTS = ROOT / "results" / "coverage.json"
DOCS = ROOT / "docs" / "reference" / "coverage.md"
TARGETS = (0.5, 0.75, 0.9)
"""Fractions of the MACs that may stay; the first one within reach is used."""
ERROR_LIMIT = 1e-4
"""Largest error that float32 rounding explains, as a fraction of the largest output."""
CHANGE_LIMIT = 1e-3
"""The same as a fraction of what the cut changed: the outputs of some networks hardly depend on the
image."""
AMPLIFIED = 1e-5
"""Above this error the outputs are compared in float64 as well."""
FLOAT64_FACTOR = 1e-3
"""The error in float64 must be smaller by this factor to count as float32's rounding."""
LEAST_CHANGE = 1e-4
"""Least relative change of the output that shows a cut."""
PRUNE = "secateur.prune"
"""The tool of the networks in `third_party`."""
PRUNE_TARGETS = (0.7, 0.85, 0.95)
"""Fractions of the MACs that may stay with that tool; the first one within reach is used."""
IMAGES = 16
"""What it gets: batches of noise, a few images each."""
SETTINGS = {"data.batch_size": 8, "model.allow_untrained": True}
TOOLS = ("secateur", "torch-pruning")
SEED = 0


def measure_secateur(member: Member, note: Note) -> None:
    """Prune a network with secateur; `note` records the results, step by step."""
    model, images = _built(member, note)
    note(stage="dependency graph")
    start = time.perf_counter()
    dependencies = build_dependency_graph(model, images, prune_residual=True)
    note(dependency_graph_seconds=_since(start), **_groups(dependencies), stage="scoring")
    start = time.perf_counter()
    scores = l2_scores(model, dependencies)
    note(scoring_seconds=_since(start), stage="plan")
    start = time.perf_counter()
    plan, target = _first_plan(scores, dependencies)
    cut_channels = sum(len(filters) for filters in plan.removed.values())
    note(plan_seconds=_since(start), macs_target=target, channels_cut=cut_channels)
    note(macs_left=dependencies.macs(plan.removed) / dependencies.macs(), stage="surgery")
    start = time.perf_counter()
    smaller = apply_plan(model, dependencies, plan)
    note(surgery_seconds=_since(start), stage="forward")
    with torch.no_grad():
        outputs = outputs_of(smaller, images)
        note(counted_macs_left=_flops(smaller, images) / _flops(model, images))
        note(stage="equivalence")
        note(
            **_equivalence(model, dependencies, plan, images),
            is_finite=all(bool(value.isfinite().all()) for value in outputs),
            stage="backward",
        )
    missing = _gradient_names(model, images) - _gradient_names(smaller, images)
    note(parameters_without_gradient=sorted(missing)[:5], stage="done")


def measure_prune(member: Member, note: Note) -> None:
    """Prune a network of another package with `secateur.prune`; `note` records the results."""
    note(stage="build")
    network = third_party.PARTS[member.part][member.name.partition(":")[2]]
    model, images = build(member, SEED), random_inputs(member, IMAGES, SEED + 1)
    errors = []
    start = time.perf_counter()
    note(stage="prune")
    for target in PRUNE_TARGETS:
        try:
            result = secateur.prune(
                model, [images], target=target, task=network.task, seed=SEED, settings=SETTINGS
            )
            break
        except TargetError as error:
            errors.append(error)
    else:
        raise errors[0]
    dependencies, scores = result._pruned.dependencies, result.scores
    note(
        prune_seconds=_since(start),
        macs_target=target,
        channels_cut=sum(len(filters) for filters in result.plan.removed.values()),
        macs_left=scores["refit"].macs / scores["before"].macs,
        metric_cut=scores["cut"].metric,
        metric_refit=scores["refit"].metric,
        **_groups(dependencies),
        stage="equivalence",
    )
    few = tree_map(lambda tensor: tensor[:2], images)
    with torch.no_grad():
        note(is_finite=all(bool(v.isfinite().all()) for v in outputs_of(result.model, few)))
        note(**_equivalence(model, dependencies, result.plan, few), stage="done")


def _equivalence(
    model: nn.Module, dependencies: DependencyGraph, plan: PruningPlan, images: Batch
) -> Row:
    """Return how far the pruned network is from the masked original, and what pruning changes."""
    outputs = outputs_of(apply_plan(model, dependencies, plan), images)
    expected = masked_network(model, dependencies, plan)(_packed(model, images))
    row = {
        "equivalence_error": _error(outputs, expected),
        "change": _error(outputs, outputs_of(model, images)),
    }
    if row["equivalence_error"] > AMPLIFIED:
        exact, same = copy.deepcopy(model).double(), tree_map(Tensor.double, images)
        reference = masked_network(exact, dependencies, plan)(_packed(exact, same))
        outputs = outputs_of(apply_plan(exact, dependencies, plan), same)
        row["equivalence_error_float64"] = _error(outputs, reference)
    return row


def measure_peer(member: Member, note: Note) -> None:
    """Prune a network with Torch-Pruning, as near to half of its MACs as a few trials come.

    A failed trial counts as one; the network counts as pruned if the best of the others runs.
    """
    model, images = _built(member, note)
    assert isinstance(images, Tensor)  # the peer is tried on networks with one input
    image = images[:1]
    note(stage="count")
    macs = peer.macs(model, image)
    low, high, ratio = 0.0, 1.0, peer.FIRST_RATIO
    errors: list[Exception] = []
    best: tuple[float, peer.PeerCut] | None = None
    start = time.perf_counter()
    for trial in range(peer.TRIALS):
        note(stage=f"trial {trial + 1}", ratio=ratio)
        try:
            cut = peer.cut(model, image, ratio)
            left = peer.macs(cut.model, image) / macs
        except Exception as error:  # whatever the peer raises is a finding
            errors.append(error)
            note(failed_trials=[reason_of(failure) for failure in errors])
            if best is None:
                raise
            high = ratio
        else:
            if best is None or abs(left - TARGETS[0]) < abs(best[0] - TARGETS[0]):
                best = (left, cut)
                note(macs_left=left, graph_seconds=cut.graph_seconds, cut_seconds=cut.cut_seconds)
            if abs(left - TARGETS[0]) < peer.CLOSE_ENOUGH:
                break
            low, high = (low, ratio) if left < TARGETS[0] else (ratio, high)
        ratio = (low + high) / 2
    assert best is not None
    smaller = best[1].model
    note(search_seconds=_since(start), ratio=best[1].ratio, stage="forward")
    with torch.no_grad():
        outputs = outputs_of(smaller, images)
        note(counted_macs_left=_flops(smaller, image) / _flops(model, image))
        before = outputs_of(model, images)
    note(change=_error(outputs, before), stage="backward")
    missing = _gradient_names(model, images) - _gradient_names(smaller, images)
    note(parameters_without_gradient=sorted(missing)[:5], stage="done")


def l2_scores(model: nn.Module, dependencies: DependencyGraph) -> dict[str, Tensor]:
    """Return the norm of every filter's kernel, by group."""
    settings = ScoreSection(criterion="l2")
    criterion = criteria.make("l2", settings, SEED, {})
    scored = score_filters(model, dependencies, lambda: (), {"l2": criterion}, None, settings)
    return scored["l2"].scores


def _first_plan(
    scores: dict[str, Tensor], dependencies: DependencyGraph
) -> tuple[PruningPlan, float]:
    """Return the plan for the first target within reach; raise `TargetError` if none is."""
    errors = []
    for fraction in TARGETS:
        try:
            return make_plan(scores, dependencies, Budget("macs", fraction), "l2"), fraction
        except TargetError as error:
            errors.append(error)
    raise errors[0]


def _built(member: Member, note: Note) -> tuple[nn.Module, Batch]:
    """Return the network and two images; raise `ValueError` if its output is zero or not finite."""
    note(stage="build")
    model = build(member, SEED)
    images = random_inputs(member, 2, SEED + 1)
    with torch.no_grad():
        outputs = outputs_of(model, images)
    if not all(bool(value.isfinite().all()) and bool(value.any()) for value in outputs):
        raise ValueError("the untouched network's output is zero or not finite")
    return model, images


def _packed(model: nn.Module, inputs: Batch) -> Tensor:
    """Return the inputs of a network as the one tensor that its graph takes."""
    return read_inputs(inputs, parameters_of(model))[0]


def _flops(model: nn.Module, images: Batch) -> int:
    """Return the floating-point operations that PyTorch counts."""
    with FlopCounterMode(display=False) as counter:
        outputs_of(model, images)
    return int(counter.get_total_flops())


def _error(outputs: tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> float:
    return relative_error(outputs, (expected,) if isinstance(expected, Tensor) else expected)


def _groups(dependencies: DependencyGraph) -> Row:
    """Return how many channels can be removed, and how many can't, by reason."""
    frozen: Counter[str] = Counter()
    for group in dependencies.frozen:
        frozen[group.cause] += group.size
    return {
        "channels": sum(len(group) for group in dependencies.groups.values()),
        "frozen_channels": dict(frozen.most_common()),
        "frozen_places": _places(dependencies),
        "frozen_groups": len(dependencies.frozen),
        "groups": len(dependencies.groups),
    }


def _places(dependencies: DependencyGraph) -> list[str]:
    """Return why most channels are frozen, each reason with operation and line."""
    frozen: Counter[str] = Counter()
    for group in dependencies.frozen:
        frozen[group.reason] += group.size
    return [reason for reason, _ in frozen.most_common(3)]


def _gradient_names(model: nn.Module, images: Batch) -> set[str]:
    """Return the parameters that get a finite gradient from the sum of the squared outputs.

    None, if the network writes over values that its gradient needs.
    """
    outputs = outputs_of(model, images)
    loss = torch.stack([value.float().square().sum() for value in outputs]).sum()
    try:
        loss.backward()
    except RuntimeError:
        return set()
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and bool(parameter.grad.isfinite().all())
    }


def _since(start: float) -> float:
    return time.perf_counter() - start


def child(arguments: argparse.Namespace) -> None:
    """Measure one network with one tool in this process."""
    torch.set_num_threads(arguments.threads)
    member = next(member for member in members() if member.name == arguments.network)
    measure = {
        "secateur": measure_secateur,
        "torch-pruning": measure_peer,
        PRUNE: measure_prune,
    }[arguments.tool]
    record(partial(measure, member), Path(arguments.out), *_packages(member, arguments.tool))


def measure(member: Member, tool: str, limit: float, threads: int) -> Row:
    """Measure one row in its own process."""
    with tempfile.TemporaryDirectory() as directory:
        result = run_child(
            "coverage.py",
            ["--network", member.name, "--tool", tool, "--threads", str(threads)],
            Path(directory) / "row.json",
            limit,
        )
    head = {"network": member.name, "tool": tool, "part": member.part, "shapes": _shapes(member)}
    command = ["python", "bench/coverage.py", "--only", member.name, "--tool", tool]
    command += ["--limit", f"{limit:g}", "--threads", str(threads)]
    return {
        **head,
        "command": shlex.join(command),
        "revision": revision(),
        "seed": SEED,
        "limit_seconds": limit,
        **result,
    }


def is_cut(row: Row | None) -> bool:
    """Return whether a network was pruned and the result runs, forward and backward."""
    if row is None or row["outcome"] != "ok" or row.get("parameters_without_gradient"):
        return False
    return bool(row.get("is_finite", True)) and row["change"] > LEAST_CHANGE


def is_within(row: Row | None, points: float) -> bool:
    """Return whether the remaining MACs, by the tool's count, are within some points of half."""
    return row is not None and is_cut(row) and abs(row["macs_left"] - 0.5) <= points / 100


def is_equivalent(row: Row | None) -> bool:
    """Return whether the pruned network equals the original with the removed channels masked."""
    if row is None or not is_cut(row):
        return False
    limit = min(ERROR_LIMIT, CHANGE_LIMIT * row["change"])
    if "equivalence_error_float64" in row:  # a deep random network amplifies rounding errors
        return bool(row["equivalence_error_float64"] <= FLOAT64_FACTOR * limit)
    return bool(row["equivalence_error"] <= limit)


def summary_table(rows: list[Row]) -> str:
    """Return how many networks of each part of the zoo each tool prunes."""
    lines = [
        "| | networks | secateur: cut, runs | within 3 points | within 5 points "
        "| equals the masked original "
        "| Torch-Pruning: cut, runs | within 3 points | within 5 points |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for part in ("torchvision", "timm", "dense", "bonus"):
        names = [member.name for member in members() if member.part == part]
        if not _is_measured(rows, part):
            continue
        ours = [_find(rows, name, "secateur") for name in names]
        theirs = [_find(rows, name, "torch-pruning") for name in names]
        cells = [part, str(len(names))]
        for tool_rows, tests in (
            (ours, (is_cut, lambda r: is_within(r, 3), lambda r: is_within(r, 5), is_equivalent)),
            (theirs, (is_cut, lambda r: is_within(r, 3), lambda r: is_within(r, 5))),
        ):
            measured = [row for row in tool_rows if row is not None]
            of = "" if len(measured) == len(names) else f" of {len(measured)} measured"
            cells += [f"{sum(map(test, measured))}{of}" if measured else "–" for test in tests]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def third_party_table(rows: list[Row]) -> str:
    """Return how many networks of each part of `third_party` `secateur.prune` takes."""
    lines = [
        "| | networks | cut, runs | equals the masked original | refit | refused with a reason |",
        "|---|---|---|---|---|---|",
    ]
    for part, title in third_party.TITLES.items():
        counts = third_party_counts(rows, part)
        lines.append(f"| {title} | {' | '.join(map(str, counts))} |")
    lines.append(f"| together | {' | '.join(map(str, third_party_counts(rows)))} |")
    return "\n".join(lines)


def third_party_counts(rows: list[Row], part: str | None = None) -> tuple[int, ...]:
    """Return how many networks of `third_party`, or of a part of it, were measured and pruned.

    The numbers are those of the columns of `third_party_table`.
    """
    parts = third_party.PARTS if part is None else (part,)
    names = [member.name for member in members() if member.part in parts]
    outcomes = [row for name in names if (row := _find(rows, name, PRUNE)) is not None]
    return (
        len(outcomes),
        sum(map(is_cut, outcomes)),
        sum(map(is_equivalent, outcomes)),
        sum("metric_refit" in row for row in outcomes),
        sum(row["outcome"] == "failed" for row in outcomes),
    )


def third_party_networks(rows: list[Row], part: str) -> str:
    """Return a table with one line for each network of a part of `third_party`."""
    lines = [
        "| network | inputs | channels removed of all | MACs left | error | agreement: cut, refit "
        "| s | frozen |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for member in members():
        row = _find(rows, member.name, PRUNE)
        if member.part != part or row is None:
            continue
        inputs = " + ".join("×".join(map(str, shape)) or "1" for shape in member.shapes)
        head = [_cell(member.name.partition(":")[2]), inputs]
        if row["outcome"] != "ok":
            lines.append(f"| {' | '.join([*head, row['reason'].replace('|', '/')])} | | | | | |")
            continue
        frozen = list(row["frozen_channels"].items())
        cells = [
            f"{row['channels_cut']:,} of {row['channels'] + sum(dict(frozen).values()):,}",
            f"{100 * row['macs_left']:.1f} %" + ("" if is_cut(row) else " (broken)"),
            f"{row['equivalence_error']:.0e}",
            f"{row['metric_cut']:.2f}, {row['metric_refit']:.2f}",
            f"{row['wall_seconds']:.0f}",
            "; ".join(f"{size}: {_cell(reason)}" for reason, size in frozen[:3]) or "–",
        ]
        lines.append(f"| {' | '.join([*head, *cells])} |")
    return "\n".join(lines)


def third_party_part(rows: list[Row]) -> str:
    """Return the part of the page on networks of other packages; empty if none is measured."""
    measured = [row for row in rows if row["tool"] == PRUNE]
    if not measured:
        return ""
    outcomes: dict[str, str] = {}
    for row in measured:
        versions = row["environment"].items()
        outcomes |= {name: v for name, v in versions if name in third_party.LICENCES}
    packages = ", ".join(
        f"{name} {version} ({third_party.LICENCES[name]})" for name, version in outcomes.items()
    )
    tables = "\n\n".join(
        f"### {title}\n\n{third_party_networks(rows, part)}"
        for part, title in third_party.TITLES.items()
        if any(row["part"] == part for row in measured)
    )
    networks, _, _, refit, refused = third_party_counts(rows)
    return f"""## Networks of other packages

`secateur.prune` prunes and refits {refit} of {networks} networks of other packages and papers, and
refuses {refused} with a reason.

{third_party_table(rows)}

These networks go through all of `secateur.prune`, with the default settings: filters are scored,
the network is cut to 70 % of its MACs (to 85 or 95 % where 70 % is out of reach), compared with
the masked original, and refit. Weights are random, and so are the {IMAGES} images, in batches of
{SETTINGS["data.batch_size"]}; networks and inputs are small, from their configuration
(`bench/third_party.py`, and `bench/definitions.py` for networks that are written down from papers).
*Agreement* is with the original network, on three images: the fraction of equal classes, or R² of
the values. It shows that every step runs, not how good it is. *s* is the time of the whole process,
beside others. A network is *refused with a reason* if `secateur.prune` says why, and where in its
code.

Packages and their licences: {packages}. `pip install "secateur[zoo]"` installs them; nothing else
needs them.

{tables}

"""


def reasons_table(rows: list[Row]) -> str:
    """Return why channels are frozen, over all networks."""
    channels: Counter[str] = Counter()
    networks: Counter[str] = Counter()
    for row in rows:
        if row["tool"] in ("secateur", PRUNE):
            for reason, size in row.get("frozen_channels", {}).items():
                channels[reason] += size
                networks[reason] += 1
    lines = ["| reason | channels | networks |", "|---|---|---|"]
    lines += [
        f"| {_cell(reason)} | {size:,} | {networks[reason]} |"
        for reason, size in channels.most_common()
    ]
    return "\n".join(lines)


def network_table(rows: list[Row], part: str) -> str:
    """Return a table with one line for each network."""
    lines = [
        "| network, pixels | channels removed of all | MACs left | error | graph + removal, s "
        "| frozen | Torch-Pruning: MACs left | graph + cut, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for member in members():
        if member.part == part:
            ours = _find(rows, member.name, "secateur")
            theirs = _find(rows, member.name, "torch-pruning")
            title = f"{member.name.partition(':')[2]}, {member.shapes[0][-1]}"
            lines.append(f"| {' | '.join([title, *_our_cells(ours), *_their_cells(theirs)])} |")
    return "\n".join(lines)


def _our_cells(row: Row | None) -> list[str]:
    if row is None:
        return 5 * ["–"]
    frozen = row.get("frozen_channels", {})
    reasons = "; ".join(f"{size}: {_cell(reason)}" for reason, size in list(frozen.items())[:3])
    if row["outcome"] != "ok":
        return [_failure(row), "–", "–", "–", reasons]
    total = row["channels"] + sum(frozen.values())
    left = f"{100 * row['macs_left']:.1f} %"
    if not is_cut(row):
        left += " (does not train)" if row["parameters_without_gradient"] else " (broken)"
    seconds = row["dependency_graph_seconds"] + row["surgery_seconds"]
    channels = f"{row['channels_cut']:,} of {total:,}"
    error = f"{row['equivalence_error']:.0e}"
    if "equivalence_error_float64" in row:
        error += f" ({row['equivalence_error_float64']:.0e} in float64)"
    return [channels, left, error, f"{seconds:.2f}", reasons or "–"]


def _their_cells(row: Row | None) -> list[str]:
    if row is None:
        return 2 * ["–"]
    if row["outcome"] != "ok":
        earlier = (
            f" ({100 * row['macs_left']:.1f} % in an earlier trial)" if "macs_left" in row else ""
        )
        return [_failure(row) + earlier, "–"]
    left = f"{100 * row['macs_left']:.1f} %"
    if not is_cut(row):
        left += " (does not train)" if row["parameters_without_gradient"] else " (not cut)"
    return [left, f"{row['graph_seconds'] + row['cut_seconds']:.2f}"]


def _failure(row: Row) -> str:
    return f"{row['outcome']} at {row.get('stage', 'start')}: {_cell(row['reason'])}"


def _cell(text: str) -> str:
    short = text if len(text) <= 120 else text[:117] + "…"
    return short.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _is_measured(rows: list[Row], part: str) -> bool:
    names = {member.name for member in members() if member.part == part}
    return any(row["network"] in names for row in rows)


def _find(rows: list[Row], network: str, tool: str) -> Row | None:
    return next((row for row in rows if (row["network"], row["tool"]) == (network, tool)), None)


def page(rows: list[Row]) -> str:
    """Return the whole of docs/reference/coverage.md."""
    halved = [row for row in rows if row["tool"] != PRUNE]
    surroundings_of = halved[-1]["environment"] if halved else {}
    listed = ", ".join(f"{name} {value}" for name, value in surroundings_of.items())
    times = [
        ours["dependency_graph_seconds"] + ours["surgery_seconds"]
        for ours in rows
        if ours["tool"] == "secateur" and ours["outcome"] == "ok"
    ]
    median = f"{statistics.median(times):.2f} s" if times else "–"
    parts = {
        "torchvision": "Classification networks of torchvision",
        "timm": "Convolutional and hybrid networks of timm",
        "dense": "Segmentation and detection networks of torchvision",
        "bonus": "Transformers (not officially supported)",
    }
    tables = "\n\n".join(
        f"## {title}\n\n{network_table(rows, part)}"
        for part, title in parts.items()
        if _is_measured(rows, part)
    )
    return f"""# Coverage: which networks can be pruned

This page lists the networks that we pruned to half of their MACs, and checks that each result is
correct. It was written by `python bench/coverage.py`. `results/coverage.json` has the command,
seed, versions and hardware of each row.

{summary_table(rows)}

- *Cut, runs*: channels are removed, the forward pass runs, and every parameter that had a
  gradient still has a finite one.
- *Within 3 (5) points*: the remaining MACs are that close to 50 %, by each tool's own count.
- *Equals the masked original*: the output equals that of the original network with the removed
  channels set to zero.

## Method

Each network has random weights (seed {SEED}) and random scales, shifts and norm statistics
(`bench/zoo.py`). It is pruned to 50 % of its MACs by the L2 norm of its filters, including
channels coupled by skip connections (`prune_residual`).

*Error* is the largest difference between the pruned network's output and the masked original's,
divided by the largest output, in float32. The two are *equal* if the error is below {ERROR_LIMIT:g}
and below {CHANGE_LIMIT:g} of what pruning changed. If it is above {AMPLIFIED:g}, it is computed
in float64 as well, where the rounding that a deep random network amplifies disappears; it must
then be {1 / FLOAT64_FACTOR:g} times smaller.

Torch-Pruning runs `MagnitudePruner` with L2 group importance. The classifier is kept, up to
{peer.TRIALS} ratios are tried, and each row states its time limit.

The median of *graph + removal* is {median}. Other programs were running, so times are rough;
[speed](speed.md) compares times properly.

Last row measured with: {listed}.

{tables}

{third_party_part(rows)}## Why channels are frozen

{reasons_table(rows)}
"""


def write_page() -> None:
    """Brings docs/reference/coverage.md up to date."""
    DOCS.write_text(page(read_rows(RESULTS)))


def _shapes(member: Member) -> list[list[int]]:
    """Return the shapes of a network's inputs as JSON holds them."""
    return [list(shape) for shape in member.shapes]


def _tools(member: Member, chosen: str) -> tuple[str, ...]:
    """Return the tools that a network is pruned with, of those that were chosen."""
    if member.part in third_party.PARTS:
        return () if chosen == "torch-pruning" else (PRUNE,)
    tools = TOOLS if chosen == "both" else (chosen,)
    # Torch-Pruning takes no network that answers other than by one tensor.
    return tuple(tool for tool in tools if member.part != "dense" or tool == "secateur")


def _packages(member: Member, tool: str) -> tuple[str, ...]:
    """Return the packages whose versions count beside those of PyTorch and secateur."""
    if tool == PRUNE:
        return third_party.packages_of(member.part, member.name.partition(":")[2])
    return ("timm", "torch-pruning") if tool == "torch-pruning" else ("timm",)


def is_there(rows: list[Row], member: Member, tool: str) -> bool:
    """Whether a row was measured with the versions that are installed, on the same images."""
    row = _find(rows, member.name, tool)
    if row is None or "environment" not in row or row["shapes"] != _shapes(member):
        return False
    return versions(row) == versions({"environment": surroundings(*_packages(member, tool))})


def main() -> None:
    """Measure the missing rows and write the tables."""
    parser = bench_parser(__doc__, limit=300)
    parser.add_argument("--tool", choices=[*TOOLS, PRUNE, "both"], default="both")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    if not arguments.tables:
        for member in members():
            if not fnmatch.fnmatch(member.name, arguments.only):
                continue
            for tool in _tools(member, arguments.tool):
                again = arguments.again and fnmatch.fnmatch(member.name, arguments.again)
                if not again and is_there(read_rows(RESULTS), member, tool):
                    continue
                row = measure(member, tool, arguments.limit, arguments.threads)
                put_row(RESULTS, row, ("network", "tool"))
                left = f"{row['macs_left']:.3f}" if "macs_left" in row else "-"
                said = row.get("reason", "")
                print(
                    member.name, tool, row["outcome"], left, row["wall_seconds"], said, flush=True
                )
    write_page()


if __name__ == "__main__":
    main()
