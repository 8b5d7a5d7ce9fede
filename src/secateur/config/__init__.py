"""The configuration of a run: one typed value, read from TOML or options, saved with the run.

The command line generates its options, their choices and their help from these sections. This
module imports no torch, so that help and shell completion are quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

from secateur.config.budget import Budget as Budget
from secateur.config.budget import BudgetLike as BudgetLike
from secateur.config.budget import Quantity as Quantity
from secateur.config.budget import parse_budget as parse_budget
from secateur.config.data import PREPROCESSING_KEYS as PREPROCESSING_KEYS
from secateur.config.data import ChannelOrder as ChannelOrder
from secateur.config.data import DataSection as DataSection
from secateur.config.data import Fit as Fit
from secateur.config.data import PadPlace as PadPlace
from secateur.config.data import Resizing as Resizing
from secateur.config.image_size import ImageSize as ImageSize
from secateur.config.names import BUILT_IN_NETWORKS as BUILT_IN_NETWORKS
from secateur.config.names import CONCEPT_SOURCES as CONCEPT_SOURCES
from secateur.config.names import CRITERIA as CRITERIA
from secateur.config.names import DATA_FORMS as DATA_FORMS
from secateur.config.names import DATA_READERS as DATA_READERS
from secateur.config.names import ENGINE_TITLES as ENGINE_TITLES
from secateur.config.names import LIBRARY_NETWORKS as LIBRARY_NETWORKS
from secateur.config.names import METRICS as METRICS
from secateur.config.section import Section as Section
from secateur.config.tables import keys_of
from secateur.config.tables import read_tables as read_tables
from secateur.config.training import BaseTrainingSection as BaseTrainingSection
from secateur.config.training import Crop as Crop
from secateur.config.training import DistillSection as DistillSection
from secateur.config.training import Optimiser as Optimiser
from secateur.config.training import Precision as Precision
from secateur.config.training import ScheduleName as ScheduleName
from secateur.config.training import TrainingPrecision as TrainingPrecision
from secateur.config.training import TrainingSection as TrainingSection
from secateur.runtime.errors import UnknownName, UsageError
from secateur.runtime.schema import describe_error

RefitLayers = Literal["downstream", "consumers", "none"]
RefitForm = Literal["patch", "channel"]
RefitSampling = Literal["auto", "even", "importance"]
AllocationRule = Literal["uniform", "sensitivity", "global", "shares"]
Action = Literal["channels", "rank", "depth"]
EngineName = Literal["pytorch", "compile", "onnxruntime", "openvino", "executorch"]
FormatName = Literal["ort", "openvino", "executorch", "coreml", "litert", "aotinductor"]
"""Formats to export to, besides ONNX."""
VoteMode = Literal["share", "top", "plurality"]
VotingUnit = Literal["cells", "regions"]
TaskKind = Literal[
    "single-label", "binary", "multi-label", "segmentation", "detection", "regression"
]
"""What a network's outputs are: one logit for each class, one for two classes, one for each of
several labels, a map of logits, or values of any form (boxes, key points, pictures, numbers)."""


class ModelSection(Section):
    """The network to prune."""

    name: str
    """Network: resnet20, vgg16_bn, …, torchvision:NAME, timm:NAME, ultralytics:yolo11n.yaml,
    smp:Unet/resnet34, transformers:DIR, yolox:NAME or path/to/file.py:factory."""
    forward: str | None = None
    """For networks that take or return more than needed: path/to/file.py:function, which is called
    with the network and the images, and returns the outputs that count."""
    weights: str | None = None
    """File or folder of weights: safetensors, or tensors that `torch.save` wrote, whatever the
    suffix. If omitted, the network keeps its initial weights."""
    weights_key: str | None = None
    """Which of several networks in the file to load, such as `model_ema`; by default an average."""
    num_classes: int | None = Field(default=None, ge=1)
    """Number of outputs of the classifier; by default the number of classes of the data."""
    task: Literal[
        "auto",
        "single-label",
        "binary",
        "multi-label",
        "segmentation",
        "detection",
        "regression",
    ] = "auto"
    """What the outputs mean: `single-label` is one class for each image, `binary` two classes by
    the sign of one output, `multi-label` a label for each output, `segmentation` a class for each
    position, `detection` and `regression` values of any form; `auto` tells from the outputs and the
    labels."""
    metric: str = "auto"
    """How the network is scored: `auto` (what is usual for the task and the labels), a metric that
    `secateur models` lists, or path/to/file.py:function, which returns a number for a network;
    higher is better."""
    decoder: str | None = None
    """For detectors from your own code: path/to/file.py:function, which makes boxes of the
    network's output; see docs/how_to/detection.md."""
    reparameterize: bool = False
    """Fold blocks that train with parallel branches into one convolution each before the cut, as
    `timm.utils.reparameterize_model` does: RepVGG, MobileOne, FastViT, RepViT, RepGhost."""
    device: str = "auto"
    """Where the network runs: `cpu`, `cuda`, `cuda:1`, `mps`, `xpu`; `auto` is the accelerator, if
    there is one. Results of different devices differ by rounding."""
    allow_untrained: bool = False
    """Continue without a weight file, and with a network that is no better than chance on the test
    images."""


class ScoreSection(Section):
    """How filters are ranked."""

    criterion: str = "vote"
    """Criterion that ranks the filters: vote, l1, taylor, …, or path/to/file.py:factory;
    `secateur models` lists all."""
    concepts: str = "auto"
    """Concept sources, separated by commas: evidence, outputs, saliency, factors:K, colours; or,
    with images of their own, masks:DIR, broden:DIR, parts:DIR, boxes:DIR. `auto` is evidence for
    classifiers, outputs for networks that return maps of classes, else saliency."""
    vote_mode: VoteMode = "share"
    """For `vote-response`: divide each vote among all filters in proportion to their strength, give
    one to each of the strongest, or give it to the strongest alone."""
    voting_unit: VotingUnit = "cells"
    """For `vote-response`: hold one vote per cell of a region, or one per region."""
    concept_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default={})
    """Weight of the votes for a concept, by its name or its category; 1 for all others."""
    top_fraction: float = Field(default=0.1, gt=0, le=1)
    """Fraction of a layer's filters that get a vote, with `vote_mode = "top"` and in `vote-iou`."""
    quantile: float = Field(default=0.01, gt=0, lt=1)
    """Fraction of positions above the filter's threshold."""
    sample_every: int = Field(default=8, ge=1)
    """Use every n-th calibration image to estimate means and thresholds."""
    threshold_positions: int = Field(default=256, ge=1)
    """Number of positions per feature map used to estimate thresholds."""
    use_labels: bool = False
    """Take concepts and gradients of the true class instead of the predicted class."""
    precision: Precision = "float32"
    """Precision of the scoring pass; `bfloat16` is faster on some CPUs."""
    fast: bool = False
    """A first look: at most 500 calibration images, `l1` in place of `vote`, the sensitivity of
    each layer on at most 32 images, and no joint estimate in the refit."""


def _split_names(value: object) -> object:
    """Return names as a list that may come as `a,b`, alone or in a list."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return value
    return [part.strip() for name in names for part in name.split(",")]


class PlanSection(Section):
    """How much is removed, and where."""

    target: Annotated[str, BeforeValidator(lambda target: str(parse_budget(target)))] = "macs=0.5"
    """Budget of the pruned network, as a fraction of the original: macs=F, params=F, filters=F,
    memory=F (peak activation memory) or latency=F (on this machine, predicted from layer times)."""
    engine: EngineName = "pytorch"
    """What runs the network where latency is measured, and what a target of latency plans for:
    PyTorch, torch.compile, onnxruntime, OpenVINO or ExecuTorch."""
    actions: Annotated[tuple[Action, ...], BeforeValidator(_split_names)] = ("channels",)
    """What makes the network smaller, each part by what costs least: `channels` removes filters,
    `rank` replaces convolutions by two thinner ones each, `depth` drops residual branches."""
    allocation: AllocationRule = "sensitivity"
    """How the budget is spread over the layers: `sensitivity` keeps the loss at the network's
    output small, as measured on calibration images; `uniform` keeps the same fraction everywhere;
    `global` removes the lowest scores anywhere; `shares` follows `plan.shares`."""
    sensitivity_images: int = Field(default=256, ge=1)
    """Calibration images that the sensitivity of each layer is measured on, at most; large images
    are fewer."""
    trials: int = Field(default=1, ge=1, le=4)
    """Plans that are tried, with `allocation = "sensitivity"`: each is cut and refitted on at most
    500 calibration images, and the one that changes the outputs least on those held out is carried
    out. The further ones take more of the first layers."""
    shares: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(default={})
    """With `allocation = "shares"`: the fraction of filters to keep, by layer name pattern
    (`"layer1.*" = 0.8`); the target's fraction is then ignored."""
    rounds: int = Field(default=1, ge=1)
    """Number of rounds of score, cut, refit and fine-tune in which the target is reached, each by
    the same factor; 1 prunes in one shot."""
    max_drop: float | None = Field(default=None, ge=0, le=100)
    """Find the smallest network that loses at most this much of the metric (percentage points of
    top-1 accuracy or mIoU, dB, …) on the validation images after the refit; the target then only
    names the quantity to minimise."""
    prune_residual: bool = False
    """Also prune channels that skip connections couple over a whole stage."""
    exclude: tuple[str, ...] = ()
    """Layers that keep all filters, by name pattern (`layer1.*`)."""
    round_to: int | None = Field(default=None, ge=1)
    """Keep a multiple of this many filters per layer, or all of them. By default 4, and 16 in
    layers of 128 or more and where feature maps are concatenated, which keeps onnxruntime fast, or
    what the `engine` needs; less where the target is out of reach otherwise."""
    min_filters: int = Field(default=1, ge=1)
    """Smallest number of filters to keep in a layer."""

    @property
    def budget(self) -> Budget:
        """The target as a value."""
        return parse_budget(self.target)

    @model_validator(mode="after")
    def _check_actions(self) -> PlanSection:
        if not self.actions or len(set(self.actions)) < len(self.actions):
            raise ValueError("actions: name channels, rank, depth or several, each once")
        quantities = {"rank": ("macs", "params"), "depth": ("macs", "params", "latency")}
        for action in sorted(quantities.keys() & set(self.actions)):
            if self.allocation != "sensitivity":
                raise ValueError(f"the action {action} needs allocation = 'sensitivity'")
            if self.budget.quantity not in quantities[action]:
                targets = " or ".join(f"{quantity}=F" for quantity in quantities[action])
                raise ValueError(
                    f"the action {action} does not plan by {self.budget.quantity}: set {targets}, "
                    f"or leave {action} out of the actions"
                )
            if self.rounds > 1:
                raise ValueError(f"the action {action} needs rounds = 1")
        return self

    @model_validator(mode="after")
    def _check_trials(self) -> PlanSection:
        is_sized = self.max_drop is not None or self.budget.quantity == "latency"
        if self.trials > 1 and (self.allocation != "sensitivity" or is_sized):
            raise ValueError(
                "trials (--trials) need allocation = 'sensitivity' and a target of macs, params, "
                "filters or memory, without max_drop (--max-drop)"
            )
        return self

    @model_validator(mode="after")
    def _check_shares(self) -> PlanSection:
        if (self.allocation == "shares") != bool(self.shares):
            raise ValueError(
                "allocation = 'shares' and a table of shares (--shares FILE) belong together"
            )
        if self.shares and self.max_drop is not None:
            raise ValueError(
                "max_drop (--max-drop) searches for a size, and shares (--shares) set one: choose "
                "one of them"
            )
        if self.rounds > 1 and (self.shares or self.max_drop is not None):
            raise ValueError(
                "rounds (--rounds) need the target's fraction: leave shares (--shares) and "
                "max_drop (--max-drop) out"
            )
        return self


class RefitSection(Section):
    """Least-squares estimates of the remaining weights, without training."""

    layers: RefitLayers = "downstream"
    """Layers to refit: `downstream` is every layer from the first cut on; `consumers` is only those
    that lost inputs, as in the paper; `none` leaves the weights as they are."""
    positions: int = Field(default=32, ge=1)
    """Number of output positions per layer and calibration image used for the regression; more of
    each image where there are fewer than 256."""
    sampling: RefitSampling = "auto"
    """Positions: `even` spaces them evenly, `importance` draws them as often as the network's
    output depends on them. `auto` is `importance` for detectors, whose images are mostly
    background, and `even` for other networks."""
    form: RefitForm = "patch"
    """Regression: `patch` fits a layer's output to its input patches; `channel` fits the removed
    input channels to the remaining ones, which is coarser and takes less memory. Layers for which
    `patch` does not fit use `channel`."""
    rectified: bool = True
    """With `patch`: count errors only where the ReLU behind the layer lets them through."""
    joint: bool = True
    """Then estimate the kernels that produce and those that consume a group's channels together,
    for what the consumers put out; not with `layers = "consumers"` or positions by importance."""
    memory_mib: int = Field(default=4096, ge=1)
    """Memory for activations, sums of products and patches, in MiB. Activations beyond one half are
    cached in temporary files; of the other half, patches get a quarter, and a layer whose sums need
    more than the rest uses `channel`. Scoring takes as much at most: where second moments of all
    patches would need more, the largest patches are replaced by single positions."""
    recalibrate_batchnorm: bool = True
    """Re-estimate batch-norm statistics after the refit if that helps on held-out calibration
    images."""

    @property
    def memory_bytes(self) -> int:
        """The memory in bytes."""
        return self.memory_mib * 2**20

    @property
    def is_any(self) -> bool:
        """Whether anything is re-estimated."""
        return self.layers != "none" or self.recalibrate_batchnorm


class ReportSection(Section):
    """What the report shows of the filters."""

    images: int = Field(default=512, ge=0)
    """Calibration images used to show what the filters see, before and after; 0 leaves the gallery
    out and reads no data."""
    top_images: int = Field(default=5, ge=1, le=16)
    """Number of top images shown per filter."""
    naming_model: str | None = None
    """Folder of an image–text model, a CLIP or SigLIP of transformers or open_clip, that names each
    filter by a word; see docs/how_to/name_filters.md."""
    vocabulary: str | None = None
    """File of the words to name filters by, one a line; by default some 800 common words and the
    names of the data's classes."""

    @model_validator(mode="after")
    def _check_vocabulary(self) -> ReportSection:
        if self.vocabulary is not None and self.naming_model is None:
            raise ValueError(
                "vocabulary (--vocabulary) needs naming_model (--naming-model), which fits its "
                "words to filters"
            )
        return self


class RunConfig(Section):
    """The configuration of a run."""

    model: ModelSection
    data: DataSection
    score: ScoreSection = ScoreSection()
    plan: PlanSection = PlanSection()
    refit: RefitSection = RefitSection()
    distill: DistillSection = DistillSection()
    finetune: TrainingSection = TrainingSection()
    report: ReportSection = ReportSection()
    seed: int = Field(default=0, ge=0)
    """Seed of every random choice."""

    @model_validator(mode="before")
    @classmethod
    def _make_fast(cls, content: Any) -> Any:
        """Change what `score.fast` changes."""
        score = content.get("score") if isinstance(content, dict) else None
        if not isinstance(score, dict) or score.get("fast") is not True:
            return content
        most = {("data", "calibration_images"): 500, ("plan", "sensitivity_images"): 32}
        content = {**content, "score": {**score}}
        if score.get("criterion", "vote") == "vote":
            content["score"]["criterion"] = "l1"
        for (section, key), count in most.items():
            values = content.get(section, {})
            asked = values.get(key, count) if isinstance(values, dict) else None
            if isinstance(asked, int):
                content[section] = {**values, key: min(asked, count)}
        refit = content.get("refit", {})
        if isinstance(refit, dict):
            content["refit"] = {"joint": False, **refit}
        return content


class BaseConfig(Section):
    """The configuration of a base network's training (`secateur train`)."""

    model: ModelSection
    """The network; training starts from its weights."""
    new_head: bool = False
    """Accept weights for another number of classes; the classifier starts from random weights."""
    data: DataSection
    """The images."""
    train: BaseTrainingSection = BaseTrainingSection()
    """The training."""
    seed: int = Field(default=0, ge=0)
    """Seed of every random choice."""

    def as_run(self) -> RunConfig:
        """Return the same network and data as the configuration of a run."""
        return RunConfig(model=self.model, data=self.data, seed=self.seed)


USER_CODE_KEYS: dict[str, str] = {
    "model.name": "--model",
    "model.forward": "--forward",
    "model.metric": "--metric",
    "model.decoder": "--decoder",
    "data.source": "--data",
}
"""Keys that may name code of the user's, path/to/file.py:function -> the option that sets them."""


def to_toml(config: RunConfig) -> str:
    """Return the configuration as TOML text, without keys that are None."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


AnyConfig = TypeVar("AnyConfig", bound=Section)


def from_dict(
    content: dict[str, Any], kind: type[AnyConfig], typed: Mapping[str, str] | None = None
) -> AnyConfig:
    """Return the configuration in nested tables.

    Raises:
        UsageError: a key or a value is wrong; the message names the key, or what the user has
            `typed` for it, such as the option `--epochs` for `finetune.epochs`.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UnknownName("key of the configuration", key, keys_of(kind)) from error
        more = error.error_count() - 1
        tail = f" (and {more} more)" if more else ""
        place = (typed or {}).get(key) or (f"configuration, {key}" if key else "configuration")
        raise UsageError(f"{place}: {describe_error(first)}{tail}") from error


def read_config(path: Path) -> RunConfig:
    """Return the configuration in a TOML file; raises `UsageError`."""
    return from_dict(read_tables(path), RunConfig)
