"""The options of the command line, generated from the sections of the configuration.

A command lists the keys it offers (`Key`); flag, type, choices, default and help come from the
configuration's fields. `command` registers a function that gets the resulting configuration.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from secateur.cli import completion
from secateur.cli.recipe import fill_in_recipe
from secateur.cli.tables import put, table_of
from secateur.config import AnyConfig, Section, from_dict, read_tables
from secateur.runtime.errors import UsageError

DATA, BUDGET, METHOD, TRAINING, OUTPUT = (
    "Network and data",
    "Budget",
    "Method",
    "Training",
    "Output",
)
"""Panels of the help."""

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


@dataclass(frozen=True)
class Key:
    """A key of the configuration that a command offers as an option."""

    path: str
    """The dotted key, such as `plan.target`."""
    panel: str
    flags: tuple[str, ...] = ()
    """Names of the option; by default the key's last part, with hyphens."""
    complete: Callable[[str], list[str]] | None = None
    """Completes a word in the shell."""

    @property
    def name(self) -> str:
        """The option as a Python parameter."""
        return self.path.replace(".", "_")

    @property
    def option(self) -> str:
        """The option as it is typed."""
        return (self.flags or ("--" + self.path.rpartition(".")[2].replace("_", "-"),))[0]


MODEL = Key("model.name", DATA, ("--model", "-m"), completion.networks)
WEIGHTS = Key("model.weights", DATA, ("--weights", "-w"))
WEIGHTS_KEY = Key("model.weights_key", DATA)
TASK = Key("model.task", DATA)
FORWARD = Key("model.forward", DATA)
METRIC = Key("model.metric", DATA)
DECODER = Key("model.decoder", DATA)
REPARAMETERIZE = Key("model.reparameterize", DATA)
NUM_CLASSES = Key("model.num_classes", DATA)
DEVICE = Key("model.device", DATA, complete=completion.devices)
ALLOW_UNTRAINED = Key("model.allow_untrained", DATA)
SOURCE = Key("data.source", DATA, ("--data", "-d"), completion.data_sets)
IMAGE_SIZE = Key("data.image_size", DATA)
SKIP_UNREADABLE = Key("data.skip_unreadable", DATA)
CALIBRATION_IMAGES = Key("data.calibration_images", DATA)
CRITERION = Key("score.criterion", METHOD, complete=completion.criteria)
CONCEPTS = Key("score.concepts", METHOD, complete=completion.concept_sources)
PRUNE_RESIDUAL = Key("plan.prune_residual", BUDGET)
EXCLUDE = Key("plan.exclude", BUDGET)
SEED = Key("seed", OUTPUT)
NAMING_MODEL = Key("report.naming_model", OUTPUT)
VOCABULARY = Key("report.vocabulary", OUTPUT)

RUN_OR_ADDRESS = r"A run folder, or hf://OWNER/NAME\[@REVISION] on the Hugging Face Hub."
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="TOML configuration file; command-line options override it.",
        rich_help_panel=OUTPUT,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Set any key of the configuration: --set data.batch_size=50. Repeatable.",
        rich_help_panel=OUTPUT,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        autocompletion=completion.devices,
        help="Where networks run: auto, cpu, cuda, cuda:1, mps or xpu (default: as configured).",
        rich_help_panel=DATA,
    ),
]
NamingModel = Annotated[
    str | None,
    typer.Option(
        "--naming-model",
        help="Folder of a CLIP or SigLIP that names each filter by a word (default: the run's).",
    ),
]
Vocabulary = Annotated[
    str | None,
    typer.Option(
        "--vocabulary", help="File of the words to name filters by (default: common words)."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace an older result at the same place.", rich_help_panel=OUTPUT
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Resume an interrupted run.", rich_help_panel=OUTPUT),
]
Tracker = Annotated[
    str | None,
    typer.Option(
        "--tracker",
        help="Log training curves with this experiment tracker: tensorboard, wandb, mlflow, "
        "or trackio. Its package must be installed.",
        rich_help_panel=OUTPUT,
    ),
]
TrackerDir = Annotated[
    Path | None,
    typer.Option(
        "--tracker-dir",
        help="Folder for the tracker's files (default of tensorboard: RUN-logs, beside the run "
        "folder RUN).",
        rich_help_panel=OUTPUT,
    ),
]


def command(
    app: typer.Typer,
    kind: type[AnyConfig],
    keys: Sequence[Key],
    *,
    name: str | None = None,
    is_made: bool = True,
    default: str | None = None,
) -> Callable[[AnyFunction], AnyFunction]:
    """Register a function as a command whose configuration is made from options.

    The function's first parameter is the configuration (of type `kind`); the others stand on the
    command line as they are annotated. The command gets an option for each of the `keys`, and
    `--config` and `--set`. With `is_made=False` the first parameter is a `ConfigOptions`, for
    commands that choose the configuration which the options override. With `default` (such as "the
    run's") the configuration comes from elsewhere: help shows that text instead of the fields'
    defaults, and there is no `--config`.
    """

    def register(function: AnyFunction) -> AnyFunction:
        signature = inspect.signature(function, eval_str=True)
        _, *declared = signature.parameters.values()
        generated = [_parameter(kind, key, default) for key in keys]
        shared = [("settings", Set)] if default else [("config", Config), ("settings", Set)]
        arguments = [parameter for parameter in declared if _is_argument(parameter)]
        others = [parameter for parameter in declared if not _is_argument(parameter)]
        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in (*arguments, *generated, *others)
        ]
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=type_)
            for name, type_ in shared
        ]

        @functools.wraps(function)
        def run(**values: Any) -> None:
            options = ConfigOptions(
                file=values.pop("config", None),
                values=tuple((key, values.pop(key.name)) for key in keys),
                assignments=tuple(values.pop("settings") or ()),
            )
            with processes():
                function(options.make(kind) if is_made else options, **values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name)(run)
        return function

    return register


def with_processes(function: AnyFunction) -> AnyFunction:
    """Return the function such that it joins the processes that torchrun started."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with processes():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


@dataclass(frozen=True)
class ConfigOptions:
    """What the command line says of the configuration, before it is put on top of anything."""

    file: Path | None
    values: tuple[tuple[Key, Any], ...]
    """Keys with values; None for options that were not used."""
    assignments: tuple[str, ...]
    """Texts such as `data.batch_size=50`."""

    def changes(self) -> dict[str, Any]:
        """Return the dotted keys that were set, `--set` last."""
        used = {key.path: _plain(value) for key, value in self.values if is_used(value)}
        return {**used, **dict(assigned(self.assignments))}

    def typed(self) -> dict[str, str]:
        """Return the dotted keys that were set, and how: the option, or `--set KEY`."""
        used = {key.path: key.option for key, value in self.values if is_used(value)}
        return {**used, **{key: f"--set {key}" for key, _ in assigned(self.assignments)}}

    def refuse(self, reason: str, *names: str) -> None:
        """Raise `UsageError` with the reason if one of some keys or sections was set."""
        for key, option in self.typed().items():
            if _is_of(key, names):
                raise UsageError(f"{option} {reason}")

    def refuse_others(self, reason: str, *names: str) -> None:
        """Raise `UsageError` with the reason if a key was set, but those keys and sections."""
        for key, option in self.typed().items():
            if not _is_of(key, names):
                raise UsageError(f"{option} {reason}")

    def make(
        self,
        kind: type[AnyConfig],
        *,
        base: Path | None = None,
        changes: dict[str, Any] | None = None,
    ) -> AnyConfig:
        """Return the configuration: `base` or the file, then `changes`, then the options.

        Raises:
            UsageError: a key or a value is wrong, or the network or the data set is missing.
        """
        path = base or self.file
        tables = read_tables(path) if path else {}
        for key, value in {**(changes or {}), **self.changes()}.items():
            put(tables, key, value)
        fill_in_recipe(tables, kind)
        for section, key, advice in REQUIRED:
            if key not in table_of(tables, section):
                raise UsageError(advice)
        return from_dict(tables, kind, self.typed())


REQUIRED = (
    (
        *("model", "name"),
        "no network is named: --model resnet20, --model torchvision:resnet18 or "
        "--model path/to/file.py:function; `secateur models` lists the names",
    ),
    (
        *("data", "source"),
        "no data is named: --data folder:photos (a folder for each class), --data cifar10:DIR or "
        "--data digits; `secateur models` lists the kinds",
    ),
)
"""Keys that a configuration needs, and what to do without."""


def is_used(value: object) -> bool:
    """Return whether an option's value is one that was typed."""
    return value is not None and value != []


def refuse(reason: str, **values: object) -> None:
    """Raise `UsageError` with the reason if one of some options, by name, was used."""
    for name, value in values.items():
        if is_used(value) and value is not False:
            raise UsageError(f"--{name.replace('_', '-')} {reason}")


def assigned(texts: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of texts such as `finetune.mixup=0.2`, values as in TOML."""
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {text}: it must be KEY=VALUE, as finetune.mixup=0.2")
        try:
            yield key, tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            yield key, value  # text without quotes


class Stopped(BaseException):
    """Passes a request to stop, its cause, through typer, which ends the process on others."""


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, if any; only the main one prints results.

    Raises `Stopped` on a request to stop.
    """
    try:
        with _process_group():
            yield
    except KeyboardInterrupt as stop:
        raise Stopped from stop


@contextlib.contextmanager
def _process_group() -> Iterator[None]:
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    from secateur.runtime import distributed

    with distributed.process_group(), contextlib.ExitStack() as stack:
        if not distributed.is_main_process():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def _is_of(key: str, names: Collection[str]) -> bool:
    """Return whether a key or its section is among some names."""
    return key in names or key.partition(".")[0] in names


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _is_argument(parameter: inspect.Parameter) -> bool:
    """Return whether a parameter is a positional argument of the command."""
    extras = getattr(parameter.annotation, "__metadata__", ())
    return any(isinstance(extra, typer.models.ArgumentInfo) for extra in extras)


def _parameter(kind: type[Section], key: Key, default: str | None) -> inspect.Parameter:
    """Return the parameter that typer makes an option of."""
    field = _field(kind, key.path)
    annotation = _option_type(field.annotation)
    flags = key.flags or (key.option,)
    if annotation is bool:
        flags = (f"{flags[0]}/--no-{flags[0].removeprefix('--')}",)
    option = typer.Option(
        *flags,
        help=_help(field, default or _default(field)),
        show_default=False,
        autocompletion=key.complete,
        rich_help_panel=key.panel,
    )
    return inspect.Parameter(
        key.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[annotation | None, option],
    )


def _field(kind: type[BaseModel], path: str) -> FieldInfo:
    """Return the field of a dotted key."""
    section, dot, name = path.partition(".")
    field = kind.model_fields[section]
    if not dot:
        return field
    inner = field.annotation
    assert isinstance(inner, type)
    assert issubclass(inner, BaseModel)
    return _field(inner, name)


def _option_type(annotation: Any) -> Any:
    """Return what typer takes for a field's type: a list for a tuple, text for several types."""
    if get_origin(annotation) in (Union, UnionType):
        [annotation] = [part for part in get_args(annotation) if part is not NoneType]
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        return str
    if get_origin(annotation) is tuple:
        return list[str]
    return annotation


def _help(field: FieldInfo, default: str | None) -> str:
    """Return the field's docstring on one line, without Markdown, and the default."""
    text = " ".join((field.description or "").split()).replace("`", "").replace("[", r"\[")
    return text if default is None else rf"{text} [dim]\[default: {default}][/]"


def _default(field: FieldInfo) -> str | None:
    """Return the field's default as the help shows it, or None if there is nothing to show."""
    default = field.default
    if field.is_required() or default in (None, (), {}) or isinstance(default, BaseModel):
        return None
    if isinstance(default, bool):
        return "yes" if default else "no"
    return str(default)
