"""The command line: arguments to the Python API, errors to one message; nothing else.

`options.py` holds the options of a run and where each is in the configuration; `common.py` consoles, errors,
and how texts such as 5,5.26,5.26 are read; the others are one module for each family of commands.
"""

from __future__ import annotations

from typing import Annotated

import typer

from braincensus.cli import census, phantom, train, train_supervised
from braincensus.cli.weights import weights_app

app = typer.Typer(
    name="braincensus",
    help="Every labelled cell of a cleared brain, counted once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    census.run,
    census.plan,
    census.info,
    census.config,
    phantom.demo,
    phantom.phantom,
    train.train,
    train_supervised.train_supervised,
):
    app.command()(_command)
app.add_typer(weights_app, name="weights")


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and stop", is_eager=True)
    ] = False,
) -> None:
    """Every labelled cell of a cleared brain, counted once."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"braincensus {installed('braincensus')}")
        raise typer.Exit
