"""The model card of a pruned network: `README.md` of its repository on the Hugging Face Hub.

Everything in it is from the run's `result.json` and `manifest.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from secateur.config import ENGINE_TITLES, TaskKind
from secateur.data import SYNTHETIC
from secateur.experiments.manifest import Manifest
from secateur.experiments.report.page import count_text
from secateur.experiments.report.times import HEADS, time_rows
from secateur.integrations.hub import SCHEME
from secateur.models import user_code
from secateur.models.score import Score, metric_text
from secateur.models.zoo import IN_MEMORY
from secateur.pipeline.result import RunResult
from secateur.pipeline.verdict import EngineTime, slower_notices, verdict

README = "README.md"
_PIPELINES: dict[TaskKind, str] = {
    "single-label": "image-classification",
    "binary": "image-classification",
    "multi-label": "image-classification",
    "segmentation": "image-segmentation",
    "detection": "object-detection",
}
"""What the Hub calls a task; others have no name there."""
_STAGES = {
    "before": "original",
    "cut": "cut",
    "refit": "refit",
    "distilled": "distilled",
    "finetuned": "fine-tuned",
}


def model_card(
    repo: str,
    manifest: Manifest,
    result: RunResult | None,
    times: Sequence[EngineTime] = (),
    *,
    base_model: str | None = None,
) -> str:
    """Return the card of a run folder's network in Markdown, with the metadata that the Hub reads.

    `repo` is the repository, `OWNER/NAME`; `base_model` the one on the Hub that holds the original.
    `times` are those that were measured in engines after the run. Without a `result`, as in a
    folder that `secateur.save` wrote, there are no figures of the run.
    """
    metadata = yaml.safe_dump(
        _metadata(repo, result, base_model), sort_keys=False, allow_unicode=True
    )
    parts = [f"# {repo.partition('/')[2]}"]
    if result is None:
        parts.append("A convolutional network that was pruned with secateur.")
    else:
        parts += [f"**{_inline(verdict(result))}.**", _summary(result), _scores(result)]
    if times:
        parts.append(_times(times))
    parts.append(_loading(repo, manifest))
    if result is not None:
        parts += [_removed(result), _origin(result), _limits(result)]
    return f"---\n{metadata}---\n\n" + "\n\n".join(parts) + "\n"


def _metadata(repo: str, result: RunResult | None, base_model: str | None) -> dict[str, Any]:
    """Return what the Hub reads at the head of a card."""
    data: dict[str, Any] = {"library_name": "secateur", "tags": ["secateur", "pruning", "pytorch"]}
    if base_model is not None:
        data["base_model"] = base_model
    if result is None:
        return data
    pipeline = _PIPELINES.get(result.task.kind)
    if pipeline is not None:
        data["pipeline_tag"] = pipeline
    dataset = _hub_dataset(result)
    if dataset is not None:
        data["datasets"] = [dataset]
    if not result.has_metric or result.config.data.source == SYNTHETIC:
        return data
    name, after = result.accuracy_name, result.stages[-1].score
    kind = "accuracy" if pipeline == "image-classification" else name.lower()
    is_percentage = result.task.metric_unit == "%"
    value = round(100 * after.metric, 2) if is_percentage else round(after.metric, 4)
    data["metrics"] = [kind]
    data["model-index"] = [
        {
            "name": repo.partition("/")[2],
            "results": [
                {
                    "task": {"type": pipeline or "other"},
                    "dataset": {
                        "type": dataset or "other",
                        "name": dataset or _data_name(result),
                        "split": "test",
                    },
                    "metrics": [{"type": kind, "value": value, "name": name}],
                }
            ],
        }
    ]
    return data


def _hub_dataset(result: RunResult) -> str | None:
    """Return the name of the data set on the Hub, if the run's is from there."""
    kind, _, name = result.config.data.source.partition(":")
    is_name = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return name if kind == "hf" and is_name else None


def _data_name(result: RunResult) -> str:
    """Return what the data set is called, without the place where it lies."""
    source = result.config.data.source
    return "own data" if user_code.is_user_code(source) else source.partition(":")[0]


def _summary(result: RunResult) -> str:
    name = result.config.model.name
    prefix, _, kind = name.partition(":")
    network = f"`{name}`"
    if user_code.is_user_code(name):
        network = "a network from a file of code"
    elif prefix == IN_MEMORY:
        network = f"a network of the class `{kind}`"
    return (
        f"This is {network}, pruned with secateur "
        f"{result.environment.secateur}: {result.removed_text}. Filters were ranked by "
        f"`{result.config.score.criterion}`, for the target `{result.config.plan.target}`."
    )


def _scores(result: RunResult) -> str:
    """Return the table of stages, and what its figures are of."""
    first, machine = result.stages[0].score, result.environment
    engine = ENGINE_TITLES[result.config.plan.engine]
    processor = machine.accelerator or f"{machine.processor}, {machine.threads} threads"
    titles = [*([result.accuracy_name] if result.has_metric else []), "same as the original"]
    titles += ["MACs", "parameters", f"latency in {engine}"]
    rows = [["stage", *titles], ["---", *["---:"] * len(titles)]]
    for stage in result.stages:
        title = _STAGES[stage.stage] + (f" (round {stage.round})" if stage.round > 1 else "")
        rows.append([title, *_figures(stage.score, result)])
    table = "\n".join(f"| {' | '.join(map(_inline, row))} |" for row in rows)
    return (
        f"## Scores\n\n{table}\n\nMeasured on {first.images} test images ({_data_name(result)}). "
        f"Latency is of {first.latency_batch} images at once in {result.engine} on "
        f"{_inline(processor)}: on other machines and in other engines it differs. MACs are "
        "multiply-accumulates for one image."
    )


def _times(times: Sequence[EngineTime]) -> str:
    """Return the table of times in engines, and where the pruned network is slower."""
    lines = [HEADS, ("---", *["---:"] * (len(HEADS) - 1)), *time_rows(times)]
    table = "\n".join(f"| {' | '.join(map(_inline, line))} |" for line in lines)
    processors = ", ".join(sorted({time.processor for time in times}))
    where = f"Medians of a forward pass on {_inline(processors)}; ratio: original over pruned."
    return "\n\n".join(["## Times in engines", table, where, *slower_notices(times)])


def _figures(score: Score, result: RunResult) -> list[str]:
    agreement = score.agreement_fraction
    return [
        *([metric_text(score.metric, result.task.metric_unit)] if result.has_metric else []),
        "" if agreement is None else f"{100 * agreement:.2f} %",
        count_text(score.macs),
        count_text(score.parameters),
        f"{score.latency_ms:.1f} ms",
    ]


def _loading(repo: str, manifest: Manifest) -> str:
    """Return how the network is loaded, and what it takes."""
    is_own = manifest.architecture is None or user_code.is_user_code(manifest.architecture)
    lines = ["import secateur", ""]
    if manifest.no_program is None:
        lines += [
            f'model = secateur.load_program("{SCHEME}{repo}")  # to run: needs no other code',
        ]
    if is_own:
        lines.append(
            f'model = secateur.load("{SCHEME}{repo}", architecture=original)  # to train: pass the '
            "unpruned network"
        )
    else:
        lines.append(f'model = secateur.load("{SCHEME}{repo}")  # to train or prune further')
    code = "\n".join(lines)
    shape = "×".join(map(str, manifest.image_shape))
    classes = "" if manifest.num_classes is None else f" and returns {manifest.num_classes} values"
    return (
        f"## Use\n\n```console\n$ pip install 'secateur[hub]'\n```\n\n```python\n{code}\n```\n\n"
        f"It takes images of {shape}{classes}. Loading runs no code from this repository: its "
        "files are JSON, TOML and safetensors, compared with the hashes in `manifest.json`."
    )


def _removed(result: RunResult) -> str:
    """Return the table of layers that lost something."""
    rows = [
        f"| `{_inline(group.name)}` | {group.filters} | {group.filters - len(group.removed)} |"
        for group in result.groups
        if group.removed
    ]
    head = "## What was removed\n\n"
    if not rows:
        return f"{head}{result.removed_text}."
    return (
        f"{head}<details><summary>{_inline(result.removed_text)}</summary>\n\n"
        "| layer | filters before | now |\n| --- | ---: | ---: |\n" + "\n".join(rows) + "\n\n"
        "</details>"
    )


def _origin(result: RunResult) -> str:
    """Return the data and the command."""
    config = result.config
    lines = [
        f"- Data: {_data_name(result)}, {config.data.calibration_images} calibration images at "
        "most; "
        + ("true labels" if result.has_labels else "no labels: the original's predictions"),
        f"- Fine-tuning: {config.finetune.epochs} epochs",
        f"- Seed: {config.seed}",
        f"- Versions: torch {result.environment.torch}, torchvision "
        f"{result.environment.torchvision}, Python {result.environment.python}",
    ]
    command = "" if not result.command else f"\n\n```console\n$ {result.command}\n```"
    return "## How it was made\n\n" + "\n".join(lines) + command


def _limits(result: RunResult) -> str:
    """Return what to know before the network is deployed."""
    notes = [
        "Accuracy is of the test images above; on other images the pruned network may lose more "
        "than the original, and classes may lose unequally.",
        *result.notices,
    ]
    return "## Limits\n\n" + "\n".join(f"- {_inline(note)}" for note in notes)


def _inline(text: str) -> str:
    """Return text from outside such that it stays one line and opens no tag or column."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
