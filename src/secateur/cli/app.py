"""The command line: its commands, and what happens on an error."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, NoReturn

import typer

from secateur.cli import options
from secateur.cli.commands.compare import compare
from secateur.cli.commands.demo import demo
from secateur.cli.commands.evaluate import KEYS as EVALUATE_KEYS
from secateur.cli.commands.evaluate import evaluate
from secateur.cli.commands.export import KEYS as EXPORT_KEYS
from secateur.cli.commands.export import export
from secateur.cli.commands.finetune import KEYS as FINETUNE_KEYS
from secateur.cli.commands.finetune import finetune
from secateur.cli.commands.inspect import KEYS as INSPECT_KEYS
from secateur.cli.commands.inspect import inspect
from secateur.cli.commands.models import models
from secateur.cli.commands.prune import KEYS as PRUNE_KEYS
from secateur.cli.commands.prune import prune
from secateur.cli.commands.push import push
from secateur.cli.commands.report import report
from secateur.cli.commands.train import KEYS as TRAIN_KEYS
from secateur.cli.commands.train import train
from secateur.config import BaseConfig, RunConfig
from secateur.runtime.errors import SecateurError, UsageError
from secateur.runtime.kept_memory import kept_memory
from secateur.runtime.signals import exit_code, repeat_signals
from secateur.runtime.version import __version__

app: typer.Typer = typer.Typer(
    help="Prune trained convolutional networks to a size or time, without labels or retraining.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool | None) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool | None,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    del version  # its callback has printed it
    del debug  # main() reads it, since it sees errors wherever they arise


options.command(app, RunConfig, PRUNE_KEYS, is_made=False)(prune)
options.command(app, RunConfig, FINETUNE_KEYS, is_made=False, default="the run's")(finetune)
options.command(app, BaseConfig, TRAIN_KEYS)(train)
options.command(app, RunConfig, EVALUATE_KEYS, is_made=False)(evaluate)
options.command(app, RunConfig, INSPECT_KEYS, is_made=False)(inspect)
options.command(app, RunConfig, EXPORT_KEYS, is_made=False, default="the run's")(export)
app.command()(push)
app.command()(options.with_processes(report))
app.command()(options.with_processes(models))
app.command()(options.with_processes(compare))
app.command()(options.with_processes(demo))


def main() -> None:
    """Run the command line and exit: 0, 1 on an error, 2 on wrong usage, 130 or 143 on a signal.

    An error of secateur becomes one line on stderr; `--debug` shows its traceback. Of several
    processes, as torchrun starts them, only the main one prints results and progress.
    """
    try:
        with repeat_signals(), kept_memory():
            code = app(prog_name="secateur", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except SecateurError as error:
        if "--debug" in sys.argv:
            raise
        _fail(str(error), 2 if isinstance(error, UsageError) else 1)
    except (KeyboardInterrupt, options.Stopped) as stop:
        # A request that was deferred, as in training, is not known to `repeat_signals`.
        request = stop if isinstance(stop, KeyboardInterrupt) else stop.__cause__
        assert isinstance(request, KeyboardInterrupt)
        if os.environ.get("RANK", "0") == "0":
            _show_stop(request)
        sys.exit(exit_code(request))
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's errors, whose class has no public name
            _fail_usage(error)
        from secateur.runtime.error_messages import explain

        reason = explain(error)
        if reason is None or "--debug" in sys.argv:
            raise
        _fail(reason, 1)


def _show_stop(stop: BaseException) -> None:
    """Print that the process was interrupted, and what the commands have noted on that."""
    from secateur.cli.console import err, escaped

    words = ["interrupted"]
    error: BaseException | None = stop
    while error is not None:
        words += getattr(error, "__notes__", ())
        error = error.__cause__
    err().print(escaped("; ".join(words)), highlight=False)


def _fail_usage(error: Any) -> NoReturn:
    """Print an error of typer's in one line that says what to do, or the help where it asks so."""
    command = "secateur" if error.ctx is None else error.ctx.command_path
    message = " ".join(error.format_message().split()).removesuffix(".")
    for words, shorter in (("Value error, ", ""), ("Input should be", "must be")):
        message = message.replace(words, shorter)  # pydantic's words, through typer
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.ctx.get_help())
        sys.exit(2)
    if message.startswith("Got unexpected extra argument"):
        first = message.partition("(s) (")[2].removesuffix(")").partition(" ")[0]
        if first.startswith("hf://") or os.path.isfile(os.path.join(first, "manifest.json")):
            message += (
                ": this command takes a network, --model NAME, and no pruned one; evaluate, export "
                "and report take a run folder"
            )
        else:
            message += ": options need their names, such as --model resnet20 --data digits"
    _fail(f"{message} ({command} --help lists the options)", 2)


def _fail(message: str, code: int) -> NoReturn:
    from secateur.cli.console import show_error

    show_error(message)
    sys.exit(code)


if __name__ == "__main__":
    main()
