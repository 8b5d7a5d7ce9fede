"""What a comparison is: networks, criteria, targets, variants and seeds under one protocol."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from secateur.config import (
    DataSection,
    DistillSection,
    ModelSection,
    PlanSection,
    RefitSection,
    RunConfig,
    ScoreSection,
    Section,
    TrainingSection,
    from_dict,
    parse_budget,
)
from secateur.errors import UsageError, WeightsError
from secateur.models import user_code
from secateur.pipeline.result import comparable

Changes = dict[str, Any]
"""Keys of a run's configuration and their values: `{"refit.layers": "none"}`."""


def _as_seeds(value: object) -> object:
    return tuple(range(value)) if isinstance(value, int) and value > 0 else value


def _as_budget(text: object) -> str:
    return str(parse_budget(str(text)))


def _flattened(value: object) -> object:
    """Tables of sections as dotted keys, so that TOML may be written either way.

    Values that are tables themselves, as `plan.shares`, stay whole.
    """
    if not isinstance(value, Mapping):
        return value
    flat: dict[str, object] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping) and "." not in key:
            flat.update({f"{key}.{name}": each for name, each in inner.items()})
        else:
            flat[key] = inner
    return flat


TargetText = Annotated[str, BeforeValidator(_as_budget)]
ChangesTable = Annotated[Changes, BeforeValidator(_flattened)]


class NetworkSection(ModelSection):
    """A network of the comparison, with what is said for it alone."""

    label: str | None = None
    """What it is called in tables; by default its name."""
    targets: tuple[TargetText, ...] = ()
    """By default those of the comparison."""
    changes: ChangesTable = Field(default={})
    """Keys of the other sections that differ for this network."""

    @property
    def title(self) -> str:
        """See `label`."""
        return self.label or self.name


class BenchmarkSpec(Section):
    """Every criterion on every network, to every target, in every variant, for every seed."""

    networks: tuple[NetworkSection, ...] = Field(min_length=1)
    """The networks, each a table of its own."""
    criteria: tuple[str, ...] = Field(default=("vote", "l1", "random"), min_length=1)
    """What gives filters their scores: names, or `path/to/file.py:factory`."""
    targets: tuple[TargetText, ...] = Field(default=("macs=0.7", "macs=0.5"), min_length=1)
    """What may stay, as in the plan of a run."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_as_seeds)] = Field(
        default=(0,), min_length=1
    )
    """What random choices depend on: the images that are held out, the calibration images, the
    order of training. A number N stands for 0 to N - 1."""
    variants: dict[str, ChangesTable] = Field(default={})
    """Keys of the other sections that differ, by the name of each variant; without any there is
    one, which is called nothing."""
    baseline: str | None = None
    """The criterion that others are compared with, or with variants `CRITERION, VARIANT`; by
    default the first criterion, in the first variant."""
    score_on: Literal["test", "validation"] = "test"
    """Which images the tables are about; choose by validation images alone."""
    threads: int = Field(default=1, ge=1)
    """Of each process: figures agree bit for bit where these agree, however many work at once."""
    data: DataSection
    score: ScoreSection = ScoreSection()
    plan: PlanSection = PlanSection()
    refit: RefitSection = RefitSection()
    distill: DistillSection = DistillSection()
    finetune: TrainingSection = TrainingSection()

    @model_validator(mode="after")
    def _check(self) -> BenchmarkSpec:
        for section, key, axis in (
            (self.plan, "target", "targets"),
            (self.score, "criterion", "criteria"),
        ):
            if key in section.model_fields_set:
                raise ValueError(f"{key} differs from cell to cell: use {axis}")
        titles = [network.title for network in self.networks]
        for axis, values in (
            ("networks", titles),
            ("criteria", self.criteria),
            ("targets", self.targets),
            ("seeds", self.seeds),
            *((f"targets of {network.title}", network.targets) for network in self.networks),
        ):
            if len(set(values)) < len(values):
                raise ValueError(f"{axis} has the same value twice; networks can have labels")
        known = [method_name(*pair) for pair in itertools.product(self.criteria, self.all_variants)]
        if self.baseline is not None and self.baseline not in known:
            raise ValueError(f"baseline must be one of {', '.join(known)}")
        return self

    def with_weights_in(self, folder: Path | None) -> BenchmarkSpec:
        """The same, with weights whose paths are relative in a folder."""
        if folder is None:
            return self
        networks = tuple(
            network.model_copy(update={"weights": str(folder / network.weights)})
            if network.weights
            else network
            for network in self.networks
        )
        return self.model_copy(update={"networks": networks})

    @property
    def all_variants(self) -> tuple[str, ...]:
        """Their names, in order."""
        return tuple(self.variants) or ("",)

    @property
    def compared_with(self) -> str:
        """See `baseline`."""
        return self.baseline or method_name(self.criteria[0], self.all_variants[0])


def method_name(criterion: str, variant: str) -> str:
    """What a row of a table is called."""
    return f"{criterion}, {variant}" if variant else criterion


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    network: str
    variant: str
    criterion: str
    target: str
    seed: int
    config: RunConfig
    id: str
    """Differs where anything differs that the result may depend on."""

    @property
    def scoring_pass(self) -> tuple[str, str, int]:
        """Cells that agree in this share the pass over the calibration images."""
        return self.network, self.variant, self.seed


def jobs_of(comparison: BenchmarkSpec) -> tuple[Job, ...]:
    """All cells, those of a unit one after another; raises `UsageError` that names a wrong key.

    Reads the weight files, of which each cell's `id` depends.
    """
    common = comparison.model_dump(
        mode="json", include={"data", "score", "plan", "refit", "distill", "finetune"}
    )
    digests: dict[str | None, str] = {None: ""}
    found = []
    for network, variant, seed in itertools.product(
        comparison.networks, comparison.all_variants, comparison.seeds
    ):
        path = network.weights
        if path not in digests:
            digests[path] = _digest(Path(str(path)))
        targets = network.targets or comparison.targets
        for criterion, target in itertools.product(comparison.criteria, targets):
            content = copy.deepcopy(common)
            content["model"] = network.model_dump(include=set(ModelSection.model_fields))
            content["seed"] = seed
            for changes in (network.changes, comparison.variants.get(variant, {})):
                _change(content, changes)
            content["plan"]["target"] = target
            content["score"]["criterion"] = criterion
            config = from_dict(content, RunConfig)
            codes = [_code_of(name) for name in (config.model.name, criterion)]
            values = {**comparable(config), "model.weights": digests[path], "codes": codes}
            labels = [network.title, variant]
            identity = [labels, values, comparison.score_on, comparison.threads]
            digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
            found.append(Job(network.title, variant, criterion, target, seed, config, digest[:16]))
    return tuple(found)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"the weights {path} can't be read: {error}") from error


def _code_of(name: str) -> str:
    """The digest of the file of code that a name names; empty without one."""
    file = Path(name.rpartition(":")[0])
    return _digest(file) if user_code.is_user_code(name) and file.is_file() else ""


def _change(content: dict[str, Any], changes: Changes) -> None:
    for dotted, value in changes.items():
        section, dot, key = dotted.partition(".")
        if not dot or section not in content or section == "model":
            raise UsageError(f"{dotted} is no key that may differ: SECTION.KEY, as refit.layers")
        if dotted in ("plan.target", "score.criterion"):
            raise UsageError(f"{dotted} has a place of its own: targets, or criteria")
        content[section][key] = value


def group_jobs(cells: Sequence[Job], processes: int = 1) -> list[list[Job]]:
    """What processes are to work off, one list each at a time.

    The cells of a unit stay together, unless that leaves processes idle, as the last units do that
    are too few for all: then they are divided. Seed by seed, so that what is there after an
    interruption can be compared.
    """
    in_order = sorted(cells, key=lambda cell: cell.seed)
    units = [
        list(group) for _, group in itertools.groupby(in_order, key=lambda cell: cell.scoring_pass)
    ]
    whole = len(units) - len(units) % processes
    last = units[whole:]
    if not last:
        return units
    parts = math.ceil(processes / len(last))
    pieces = [piece for unit in last for piece in _divided(unit, min(parts, len(unit)))]
    return [*units[:whole], *pieces]


def _divided(cells: list[Job], parts: int) -> list[list[Job]]:
    """In parts that follow each other and differ by one cell at most."""
    bounds = [part * len(cells) // parts for part in range(parts + 1)]
    return [cells[start:stop] for start, stop in itertools.pairwise(bounds)]
