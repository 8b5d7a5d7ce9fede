"""What a benchmark says in one sentence, and under which protocol."""

from __future__ import annotations

import statistics

from secateur.config import ENGINE_TITLES
from secateur.experiments.compare.spec import BenchmarkSpec
from secateur.experiments.compare.statistics import BenchmarkStatistics, Difference

MOST_NAMES = 6
"""Names of networks that are listed."""


def benchmark_verdict(stats: BenchmarkStatistics) -> str:
    """Return which method is best, and whether its lead is significant: without a full stop.

    Methods are compared by their mean top-1 over all settings that any has finished.
    """
    means = {
        method: statistics.mean(values)
        for method in stats.methods
        if (values := stats.means(method).values())
    }
    if not means:
        return "No method has finished every setting"
    best = max(means, key=means.__getitem__)
    settings = _count(len(stats.measured), "setting")
    if len(means) == 1:
        return f"{best} has {means[best]:.2f} % top-1 in the mean over {settings}"
    text = f"{best} is best in the mean over {settings}, with {means[best]:.2f} % top-1"
    if best != stats.baseline:
        lead = stats.overall(best)
        return text if lead is None else f"{text}: {_lead(lead, stats.baseline)}"
    others = {method: stats.overall(method) for method in means if method != best}
    equal = [
        method for method, other in others.items() if other and other.verdict == "not significant"
    ]
    if any(other and other.seeds == 1 for other in others.values()):
        return f"{text}; one seed can't tell whether its lead is more than chance"
    if not equal:
        return f"{text}; all others are significantly worse"
    verb = "is" if len(equal) == 1 else "are"
    return f"{text}; {_joined(equal)} {verb} not significantly different"


def _lead(lead: Difference, baseline: str) -> str:
    ahead = f"{lead.mean:.2f} points ahead of {baseline}"
    if lead.seeds == 1:
        return f"{ahead}, with one seed, which can't tell whether that is more than chance"
    interval = f"95 % interval {lead.low:+.2f} to {lead.high:+.2f}".replace("-", "−")
    return f"{ahead} ({interval}{'' if lead.verdict == 'better' else '; not significant'})"


def protocol(spec: BenchmarkSpec) -> str:
    """Return what was compared, on what, and how, in sentences."""
    networks = [network.title for network in spec.networks]
    named = f" ({', '.join(networks)})" if len(networks) <= MOST_NAMES else ""
    axes = [
        f"{_count(len(networks), 'network')}{named}",
        f"{len(spec.criteria)} {'criterion' if len(spec.criteria) == 1 else 'criteria'}",
        f"{_count(len(spec.targets), 'target')} ({', '.join(spec.targets)})",
        *([f"{_count(len(spec.variants), 'variant')}"] if spec.variants else []),
        _count(len(spec.seeds), "seed"),
    ]
    steps = [
        "no refit" if spec.refit.layers == "none" else "refit",
        f"distilled for {_count(spec.distill.epochs, 'epoch')}"
        if spec.distill.epochs
        else "no distillation",
        f"fine-tuned for {_count(spec.finetune.epochs, 'epoch')}"
        if spec.finetune.epochs
        else "no fine-tuning",
    ]
    changes = " Variants and networks may change this." if _has_changes(spec) else ""
    return (
        f"{' × '.join(axes)}, on {spec.data.source} with {spec.data.calibration_images} "
        f"calibration images. Every method runs the same steps: {', '.join(steps)}.{changes} "
        f"Accuracy is that after the last step, on the {spec.score_on} images; methods are "
        f"paired by seed. Latency is that in {ENGINE_TITLES[spec.plan.engine]}."
    )


def _has_changes(spec: BenchmarkSpec) -> bool:
    return any(spec.variants.values()) or any(network.changes for network in spec.networks)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _joined(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
