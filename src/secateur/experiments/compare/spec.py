"""The specification of a benchmark: networks, criteria, targets, variants and seeds."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
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
    read_tables,
)
from secateur.experiments.compare.job import Job, method_name
from secateur.models import checkpoint_files, user_code
from secateur.pipeline.result import comparable
from secateur.runtime.errors import UsageError
from secateur.runtime.hashing import file_hash

Changes = dict[str, Any]
"""Keys of a run's configuration and their values: `{"refit.layers": "none"}`."""


def _as_seeds(value: object) -> object:
    return tuple(range(value)) if isinstance(value, int) and value > 0 else value


def _as_budget(text: object) -> str:
    return str(parse_budget(str(text)))


def _flattened(value: object) -> object:
    """Return tables of sections as dotted keys, so that TOML may be written either way.

    Values that are tables themselves, as `plan.shares`, stay whole.
    """
    if not isinstance(value, Mapping):
        return value
    flat: dict[str, object] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping) and "." not in key:
            flat.update({f"{key}.{name}": item for name, item in inner.items()})
        else:
            flat[key] = inner
    return flat


TargetText = Annotated[str, BeforeValidator(_as_budget)]
ChangesTable = Annotated[Changes, BeforeValidator(_flattened)]


class NetworkSection(ModelSection):
    """A network of the benchmark, with its own targets and changes."""

    label: str | None = None
    """Its name in tables; by default `name`."""
    targets: tuple[TargetText, ...] = ()
    """By default those of the benchmark."""
    changes: ChangesTable = Field(default={})
    """Keys of the other sections that differ for this network."""

    @property
    def title(self) -> str:
        """Return the name; see `label`."""
        return self.label or self.name


class BenchmarkSpec(Section):
    """Every criterion on every network, for every target, variant and seed."""

    networks: tuple[NetworkSection, ...] = Field(min_length=1)
    """The networks, each a `[[networks]]` table."""
    criteria: tuple[str, ...] = Field(default=("vote", "l1", "random"), min_length=1)
    """Criteria that score filters: names, or `path/to/file.py:factory`."""
    targets: tuple[TargetText, ...] = Field(default=("macs=0.7", "macs=0.5"), min_length=1)
    """Budgets to prune to, as `plan.target` of a run."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_as_seeds)] = Field(
        default=(0,), min_length=1
    )
    """Seeds of every random choice: held-out images, calibration images, order of training. A
    number N stands for 0 to N - 1."""
    variants: dict[str, ChangesTable] = Field(default={})
    """Keys of the other sections that differ, by the name of the variant. Without variants there is
    one, whose name is empty."""
    baseline: str | None = None
    """The method that others are compared with: a criterion, or with variants `CRITERION, VARIANT`;
    by default the first criterion in the first variant."""
    score_on: Literal["test", "validation"] = "test"
    """Images that accuracies are measured on. Use the validation images to choose a method."""
    threads: int = Field(default=1, ge=1)
    """Threads of each worker process. Results with equal `threads` are bit-equal, for any number of
    workers."""
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
                raise ValueError(f"{key} differs from job to job: use {axis}")
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
        """Return a copy that looks for weights with relative paths in a folder."""
        if folder is None:
            return self
        networks = tuple(
            network.model_copy(update={"weights": str(folder / network.weights)})
            if network.weights
            else network
            for network in self.networks
        )
        return self.model_copy(update={"networks": networks})

    def on_device(self, name: str | None) -> BenchmarkSpec:
        """Return a copy that runs every network on a device."""
        if name is None:
            return self
        networks = tuple(network.model_copy(update={"device": name}) for network in self.networks)
        return self.model_copy(update={"networks": networks})

    @property
    def all_variants(self) -> tuple[str, ...]:
        """Names of the variants, in order; one empty name if there are none."""
        return tuple(self.variants) or ("",)

    @property
    def compared_with(self) -> str:
        """Return the name of the baseline; see `baseline`."""
        return self.baseline or method_name(self.criteria[0], self.all_variants[0])


def read_spec(path: Path) -> BenchmarkSpec:
    """Return the benchmark in a TOML file; raise `UsageError` that names a wrong key."""
    return from_dict(read_tables(path), BenchmarkSpec)


def jobs_of(spec: BenchmarkSpec) -> tuple[Job, ...]:
    """Return all jobs of a benchmark; those of one scoring pass follow each other.

    Reads the weight files, since a job's `id` depends on them.

    Raises:
        UsageError: A changed key is wrong; the message names it.
        WeightsError: A weight file can't be read.
    """
    common = spec.model_dump(
        mode="json", include={"data", "score", "plan", "refit", "distill", "finetune"}
    )
    digests: dict[str | None, str] = {None: ""}
    jobs = []
    for network, variant, seed in itertools.product(spec.networks, spec.all_variants, spec.seeds):
        path, key = network.weights, network.weights_key
        if path not in digests:
            digests[path] = checkpoint_files.digest(Path(str(path)))
        targets = network.targets or spec.targets
        for criterion, target in itertools.product(spec.criteria, targets):
            content = copy.deepcopy(common)
            content["model"] = network.model_dump(include=set(ModelSection.model_fields))
            content["seed"] = seed
            for changes in (network.changes, spec.variants.get(variant, {})):
                _change(content, changes)
            content["plan"]["target"] = target
            content["score"]["criterion"] = criterion
            config = from_dict(content, RunConfig)
            codes = [_code_digest(name) for name in (config.model.name, criterion)]
            if user_code.is_user_code(config.data.source):
                codes.append(_code_digest(config.data.source))
            weights = digests[path] if key is None else f"{digests[path]} {key}"
            values = {**comparable(config), "model.weights": weights, "codes": codes}
            del values["model.weights_key"]  # it counts with the weights
            labels = [network.title, variant]
            identity = [labels, values, spec.score_on, spec.threads]
            digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
            jobs.append(Job(network.title, variant, criterion, target, seed, config, digest[:16]))
    return tuple(jobs)


def _code_digest(name: str) -> str:
    """Return the digest of the code file in a name such as `file.py:factory`; empty if none."""
    file = Path(name.rpartition(":")[0])
    return file_hash(file) if user_code.is_user_code(name) and file.is_file() else ""


def _change(content: dict[str, Any], changes: Changes) -> None:
    for dotted, value in changes.items():
        section, dot, key = dotted.partition(".")
        if not dot or section not in content or section == "model":
            raise UsageError(f"{dotted} can't be changed: use SECTION.KEY, as refit.layers")
        if dotted in ("plan.target", "score.criterion"):
            raise UsageError(f"{dotted} can't be changed here: use targets or criteria")
        content[section][key] = value


def group_jobs(jobs: Sequence[Job], workers: int = 1) -> list[list[Job]]:
    """Return lists of jobs, each for one worker process.

    Jobs of one scoring pass stay together. Only if the last passes are too few for all workers are
    they divided. The lists go seed by seed, so that the results of an interrupted benchmark can be
    compared.
    """
    in_order = sorted(jobs, key=lambda job: job.seed)
    passes = [
        list(group) for _, group in itertools.groupby(in_order, key=lambda job: job.scoring_pass)
    ]
    whole = len(passes) - len(passes) % workers
    last = passes[whole:]
    if not last:
        return passes
    parts = math.ceil(workers / len(last))
    pieces = [piece for group in last for piece in _divide(group, min(parts, len(group)))]
    return [*passes[:whole], *pieces]


def _divide(jobs: list[Job], parts: int) -> list[list[Job]]:
    """Return consecutive parts whose lengths differ by at most one."""
    bounds = [part * len(jobs) // parts for part in range(parts + 1)]
    return [jobs[start:stop] for start, stop in itertools.pairwise(bounds)]
