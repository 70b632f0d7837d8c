# SPDX-License-Identifier: Apache-2.0
"""The command line ``megatron-g2rpo``: parses arguments, launches processes, calls the commands, prints results."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from megatron_g2rpo import __version__
from megatron_g2rpo.cli import convert, data, loops, machines, measuring
from megatron_g2rpo.train.run import signals

# Read by OpenMP when torch is loaded. Its default, spinning, made a step on a CPU that something else also used five
# times slower; waiting costs a fifth on an idle one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"megatron-g2rpo {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Post-train vision-language models with G2RPO on Megatron-core."""


def _application() -> typer.Typer:
    """Return the verbs, in the order of the help."""
    verbs = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    verbs.callback()(_options)
    verbs.command()(loops.train)
    verbs.command()(loops.sft)
    verbs.command()(measuring.logprobs)
    verbs.command(name="eval")(measuring.evaluate)
    verbs.command()(machines.plan)
    verbs.command()(machines.serve)
    verbs.command()(machines.report)
    verbs.command()(machines.doctor)
    conversion = typer.Typer(
        no_args_is_help=True, help="Convert weights from Hugging Face format to Megatron, and back."
    )
    conversion.command("import")(convert.convert_import)
    conversion.command("export")(convert.convert_export)
    verbs.add_typer(conversion, name="convert")
    datasets = typer.Typer(no_args_is_help=True, help="Import datasets of other formats, check them, show them.")
    datasets.command("import")(data.data_import)
    datasets.command("check")(data.data_check)
    datasets.command("show")(data.data_show)
    verbs.add_typer(datasets, name="data")
    return verbs


app = _application()


def main() -> None:
    """Run the command line as the program of this process."""
    signals.for_good()
    app()
