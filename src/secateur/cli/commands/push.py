"""`secateur push`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import options


def push(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    repo: Annotated[str, typer.Argument(help="The repository, OWNER/NAME; it is made if need be.")],
    private: Annotated[
        bool,
        typer.Option("--private", help="Make the repository private; refuse one that is public."),
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", help="Branch, made if need be (default: main)."),
    ] = None,
    message: Annotated[str | None, typer.Option("--message", help="Message of the commit.")] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", help="Repository of the original network, for the card."),
    ] = None,
    card: Annotated[
        bool,
        typer.Option("--card/--no-card", help="Write the model card, README.md, from the result."),
    ] = True,
    as_json: options.Json = False,
) -> None:
    """Push the pruned network of a run folder to the Hugging Face Hub, with a model card.

    Weights, plan, program, configuration and result are pushed: they name the command and the paths
    of the run. No report, log or checkpoint goes along. Log in first, with hf auth login or
    HF_TOKEN. Needs the extra: pip install 'secateur\\[hub]'

    Example: secateur push runs/a me/resnet50-half --private
    """
    if not card:
        options.refuse("is for the card, and --no-card writes none", base_model=base_model)

    from secateur.cli import console
    from secateur.experiments.push import push as push_folder

    url = push_folder(
        run,
        repo,
        private=private,
        revision=revision,
        message=message,
        base_model=base_model,
        card=card,
    )
    if as_json:
        print(json.dumps({"repo": repo, "commit": url}, indent=1))
    else:
        console.say(f"pushed: {url}")
