"""Everything that a run can be told, in one typed value that is saved with it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast, get_args

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from secateur.errors import TargetError, UnknownName, UsageError
from secateur.runtime.input_limits import SMALL_TEXT, check_dots, read_bounded
from secateur.runtime.schema import describe_error

RefitLayers = Literal["downstream", "consumers", "none"]
RefitForm = Literal["patch", "channel"]
Precision = Literal["auto", "float32", "bfloat16"]
TrainingPrecision = Literal["auto", "float32", "bfloat16", "float16"]
Optimiser = Literal["sgd", "adamw"]
Crop = Literal["random_crop", "random_resized_crop", "none"]
Resizing = Literal["bilinear", "bicubic"]
"""How the pixels of a resized image are made from those around them, antialiased."""
ScheduleName = Literal["cosine", "one_cycle", "step"]
AllocationRule = Literal["uniform", "sensitivity", "global", "shares"]
Quantity = Literal["macs", "params", "filters", "memory", "latency"]


@dataclass(frozen=True)
class Budget:
    """How much of a quantity may stay: `macs=0.7` leaves at most 70 % of the MACs."""

    quantity: Quantity
    fraction_left: float

    def __str__(self) -> str:
        return f"{self.quantity}={self.fraction_left}"


def parse_budget(text: str) -> Budget:
    """The target that a text such as `macs=0.7` names; raises `TargetError`."""
    quantity, equals, number = text.partition("=")
    *names, last = (f"{name}=F" for name in get_args(Quantity))
    expected = f"give {', '.join(names)} or {last} with the fraction F that stays, 0 < F <= 1"
    if quantity not in get_args(Quantity) or not equals:
        raise TargetError(f"target {text!r} is not understood: {expected}")
    try:
        fraction = float(number)
    except ValueError:
        raise TargetError(f"target {text!r} has no number: {expected}") from None
    if not 0 < fraction <= 1:
        raise TargetError(f"target {text!r} is out of range: {expected}")
    return Budget(cast(Quantity, quantity), fraction)


class Section(BaseModel):
    """A part of the configuration; unknown keys are an error."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True
    )


class ModelSection(Section):
    """The network to prune."""

    name: str
    """`resnet20`, `vgg16_bn`, …, `torchvision:NAME`, `timm:NAME` or `path/to/file.py:factory`."""
    weights: str | None = None
    """A .safetensors, .pth, .pt or .th file; without one the network is as its maker left it."""
    num_classes: int | None = Field(default=None, ge=1)
    """Outputs of the network's head; by default the number of classes of the data."""


class DataSection(Section):
    """The images."""

    source: str
    """`cifar10:DIR`, `imagenet:DIR`, `folder:DIR`, …; `secateur models` lists the kinds."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training images that is held out of everything, to choose by."""
    calibration_images: int = Field(default=2000, ge=1)
    """Training images that filters are scored with and kernels re-estimated from."""
    stratified: bool = True
    """Whether the calibration images are drawn equally from every class, or without a look at
    labels."""
    image_size: int | None = Field(default=None, ge=8)
    """Side of the square images in pixels; by default what the network was made for."""
    mean: tuple[float, float, float] | None = None
    """Mean of x / 255 by colour; by default what the network was made for."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of x / 255 by colour; by default what the network was made for."""
    interpolation: Resizing | None = None
    """`bilinear` or `bicubic`: how images are resized; by default what the network was made for."""
    batch_size: int = Field(default=100, ge=2)
    """Images at a time, in scoring, refit and evaluation."""
    skip_unreadable: bool = False
    """Whether image files that can't be read are left out and counted, not an error."""


class ScoreSection(Section):
    """How filters are ranked."""

    criterion: str = "vote"
    """What gives a filter its score; `secateur models` lists the criteria."""
    concepts: str = "evidence"
    """Where the semantic parts of an image come from, several after commas: `evidence`,
    `saliency`, `factors:K`, `colours`, or with images of their own `masks:DIR`, `broden:DIR`,
    `parts:DIR`, `boxes:DIR`."""
    vote_mode: Literal["share", "top", "plurality"] = "share"
    """Of `vote-response`: whether a vote is divided among the filters in proportion to their
    strength, or goes to each of the strongest, or to the strongest one."""
    voting_unit: Literal["cells", "regions"] = "cells"
    """Of `vote-response`: whether filters compete at each cell of a region, or over the whole."""
    concept_weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    """What a vote counts, by the name or the category of its concept; 1 for all others."""
    top_fraction: float = Field(default=0.1, gt=0, le=1)
    """Share of a layer's filters that get a vote at a time, with the ballot `top` and in
    `vote-iou`."""
    quantile: float = Field(default=0.01, gt=0, lt=1)
    """Share of positions at which a filter exceeds its threshold."""
    sample_every: int = Field(default=8, ge=1)
    """Every n-th calibration image is looked at beforehand, for means and thresholds."""
    threshold_positions: int = Field(default=256, ge=1)
    """Positions of each of its feature maps that thresholds are taken from."""
    use_labels: bool = False
    """Whether concepts and gradients are those of the true class, not of the predicted one."""
    precision: Precision = "float32"
    """What the network computes in while it is looked at; `bfloat16` is faster on some CPUs."""


class PlanSection(Section):
    """What should be left."""

    target: Annotated[str, BeforeValidator(lambda text: str(parse_budget(str(text))))] = "macs=0.5"
    """`macs=F`, `params=F`, `filters=F`, `memory=F` (peak bytes of activations) or `latency=F` (on
    this machine, predicted from times of the layers): the fraction of the original that may
    stay."""
    allocation: AllocationRule = "sensitivity"
    """How the cut is spread over the layers: `curves`, so that little is lost at the network's
    output, as measured on calibration images; `uniform`, the same share everywhere; `global`, the
    lowest scores wherever they are; `shares`, as given."""
    shares: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}
    """With `allocation = "shares"`: what stays of the filters, by name pattern (`layer1.*`). The
    target's fraction is not looked at then."""
    rounds: int = Field(default=1, ge=1)
    """Rounds of scoring, cutting, re-estimating and fine-tuning, each by the same factor, in which
    the target is reached; one is one-shot."""
    max_drop: float | None = Field(default=None, ge=0, le=100)
    """Points of top-1 that may be lost on the validation images after the refit. The smallest
    network that keeps to it is looked for; the target then only says which quantity is small."""
    prune_residual: bool = False
    """Whether channels that residual sums tie over a whole stage may go, too."""
    exclude: tuple[str, ...] = ()
    """Name patterns (`layer1.*`) of layers whose filters must all stay."""
    round_to: int = Field(default=1, ge=1)
    """A layer keeps a multiple of so many filters, or all; 8 suits most hardware."""
    min_filters: int = Field(default=1, ge=1)
    """Filters that every layer keeps at least."""

    @model_validator(mode="after")
    def _check_shares(self) -> PlanSection:
        if (self.allocation == "shares") != bool(self.shares):
            raise ValueError("allocation = 'shares' and a table of shares belong together")
        if self.shares and self.max_drop is not None:
            raise ValueError("max_drop looks for a size, and shares give one: choose one of them")
        if self.rounds > 1 and (self.shares or self.max_drop is not None):
            raise ValueError("rounds need a target's fraction: without shares and max_drop")
        return self


class RefitSection(Section):
    """Closed-form re-estimation of the remaining kernels."""

    layers: RefitLayers = "downstream"
    """`downstream`: every layer from the first cut on; `consumers`: only those that lost inputs,
    the literal reading of the paper; `none`: kernels stay as they are."""
    positions: int = Field(default=32, ge=1)
    """Output positions of a layer that are looked at in each calibration image."""
    form: RefitForm = "patch"
    """`patch`: a layer's answer is regressed on what its kernel meets; `channel`: the channels that
    it read are regressed on those that are left. Where `patch` can't be, `channel` serves."""
    rectified: bool = True
    """Whether errors count only where a rectifier behind the layer lets them through (`patch`)."""
    memory_mib: int = Field(default=4096, ge=1)
    """Memory for activations and sums of products. Activations beyond one half wait in temporary
    files; a layer whose sums would take more than the other half is estimated by channels."""
    recalibrate_batchnorm: bool = True
    """Whether to re-estimate the statistics of batch norms where held-out images say that it
    helps."""

    @property
    def is_any(self) -> bool:
        """Whether anything is re-estimated."""
        return self.layers != "none" or self.recalibrate_batchnorm


class DistillSection(Section):
    """Training on the calibration images alone, by the original network's answers, without
    labels."""

    epochs: int = Field(default=0, ge=0)
    """Passes over the calibration images that are not held out; 0 leaves the step out."""
    batch_size: int = Field(default=100, ge=2)
    """Images a step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Largest learning rate of the cosine schedule, of AdamW."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Pull of every parameter towards zero."""
    warmup_steps: int = Field(default=16, ge=0)
    """Steps over which the learning rate rises."""
    flip: bool = True
    """Whether half of the images are mirrored; not for digits and letters."""
    temperature: float = Field(default=3.0, gt=0)
    """Softening of both networks' answers."""
    precision: Precision = "auto"
    """`auto` takes bfloat16 where the CPU has instructions for it."""


class TrainingSection(Section):
    """Training: of a base network, or after the cut."""

    epochs: int = Field(default=5, ge=0)
    """Passes over the training images; 0 leaves the network as it is."""
    batch_size: int = Field(default=128, ge=2)
    """Images a step, of all processes together."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Parts that each process's share of a step is worked through in, for less memory."""
    optimiser: Optimiser = "sgd"
    """SGD with Nesterov momentum, or AdamW."""
    learning_rate: float = Field(default=0.02, gt=0)
    """Largest learning rate of the schedule."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Nesterov momentum of SGD."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """L2 penalty on every parameter, decoupled from the gradient with AdamW."""
    schedule: ScheduleName = "cosine"
    """`cosine` falls to zero; `one_cycle` rises for 30 % of the steps first; `step` falls at
    `step_at`."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps over which the learning rate rises; `one_cycle` has a rise of its own."""
    step_at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5, 0.75)
    """Shares of the training at which `step` multiplies the learning rate by `step_factor`."""
    step_factor: float = Field(default=0.1, gt=0, lt=1)
    """See `step_at`."""
    crop: Crop | None = None
    """`shift` moves images by up to an eighth of their side, `resized` takes a random part of the
    stored image and resizes it, `none` takes images as they are; by default `shift` for images of
    up to 64 pixels a side and for tensors, `resized` for larger ones in files."""
    flip: bool = True
    """Whether half of the training images are mirrored; not for digits and letters."""
    randaugment: bool = False
    """Whether RandAugment changes the images, too."""
    mixup: float = Field(default=0.0, ge=0)
    """Images are mixed with others by a share drawn from Beta(mixup, mixup); 0 mixes none."""
    cutmix: float = Field(default=0.0, ge=0)
    """Boxes of others are put into images, by an area drawn from Beta(cutmix, cutmix). With both
    every step takes one of the two."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the labels that is spread over all classes."""
    label_weight: float = Field(default=0.3, ge=0, le=1)
    """Weight of the labels in the loss; the rest is the original network's. 0: no labels."""
    temperature: float = Field(default=3.0, gt=0)
    """Softening of both networks' answers."""
    feature_weight: float = Field(default=0.0, ge=0)
    """Weight in the loss of the relative squared error of the feature maps at residual sums, in the
    channels that stay, against the original network's."""
    freeze_batchnorm: bool = False
    """Train in evaluation mode: batch norms keep their statistics, and dropout drops nothing."""
    sync_batchnorm: bool = True
    """Whether batch norms take the statistics of a batch over all processes."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Weight of the past, a step, in the running average of the weights that the training ends with
    (EMA); 0: the weights themselves."""
    keep: Literal["last", "best"] = "last"
    """Whether the weights of the last epoch stay or those that were best on the validation images;
    then also those before the training where no epoch was better."""
    patience: int | None = Field(default=None, ge=1)
    """Epochs without a better result on the validation images after which training ends early."""
    max_minutes: float | None = Field(default=None, gt=0)
    """Time after which training ends early, over all its resumptions."""
    precision: TrainingPrecision = "auto"
    """`auto` takes bfloat16 where the hardware has instructions for it; `float16`, with a scaled
    loss, is for accelerators."""
    compile: bool = False
    """Whether the network is compiled for training (`torch.compile`); what else this process has
    compiled is then compiled anew when it is used next."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that read images ahead; by default none for images in memory, and up to 4 for
    files."""
    checkpoint_minutes: float = Field(default=5.0, ge=0)
    """Time between two checkpoints within an epoch; every epoch ends with one, too."""

    @model_validator(mode="after")
    def _check_compile(self) -> TrainingSection:
        if self.compile and self.feature_weight:
            raise ValueError("compile and feature_weight exclude each other")
        return self


class ReportSection(Section):
    """What the report shows of the filters."""

    images: int = Field(default=512, ge=0)
    """Calibration images that the filters are looked at with, before and after; 0: no gallery."""
    top_images: int = Field(default=5, ge=1, le=16)
    """Images that are shown of each filter, those that it responds to most."""


class RunConfig(Section):
    """A whole run."""

    model: ModelSection
    data: DataSection
    score: ScoreSection = ScoreSection()
    plan: PlanSection = PlanSection()
    refit: RefitSection = RefitSection()
    distill: DistillSection = DistillSection()
    finetune: TrainingSection = TrainingSection()
    report: ReportSection = ReportSection()
    seed: int = Field(default=0, ge=0)
    """What every random choice depends on."""


def to_toml(config: RunConfig) -> str:
    """The configuration as TOML; what is None is left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


AnyConfig = TypeVar("AnyConfig", bound=Section)


def from_dict(content: dict[str, Any], kind: type[AnyConfig]) -> AnyConfig:
    """The configuration that nested tables hold; raises `UsageError` that names the key."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UnknownName("key of the configuration", key, _keys(kind)) from error
        more = error.error_count() - 1
        tail = f" (and {more} more)" if more else ""
        place = f"configuration, {key}" if key else "configuration"
        raise UsageError(f"{place}: {describe_error(first)}{tail}") from error


def _keys(kind: type[BaseModel]) -> list[str]:
    """Every key that a configuration can have, with its section."""
    found = []
    for name, field in kind.model_fields.items():
        section: Any = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            found += [f"{name}.{key}" for key in _keys(section)]
        else:
            found.append(name)
    return found


def read_config(path: Path) -> RunConfig:
    """The configuration in a TOML file; raises `UsageError`."""
    return from_dict(read_tables(path), RunConfig)


def read_tables(path: Path, content: str = "configuration") -> dict[str, Any]:
    """The tables in a TOML file, which holds some `content`; raises `UsageError`."""
    try:
        text = read_bounded(path, SMALL_TEXT, UsageError).decode("utf-8")
        check_dots(text)
        return tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise UsageError(f"the {content} {path} can't be read: {error}") from error
    except RecursionError as error:
        raise UsageError(f"{path} is not TOML of ours: it nests too deeply") from error
    except ValueError as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
