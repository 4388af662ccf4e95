"""Commands that look into selections and exchange them with other programs."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_bliss.cli.options import JsonOption, RoundOption, RunArgument, RunOption

app = typer.Typer()
_PANEL = "Selections, looked at and exchanged"


@app.command(rich_help_panel=_PANEL)
def explain(
    name: Annotated[str, typer.Argument(metavar="SHARD:ID", help="A shard's name or prefix, and a sequence of it.")],
    run_dir: RunOption,
    as_json: JsonOption = False,
) -> None:
    """One sequence: its text, score, rank, whether it is kept and why not, and the LLM's steps that read it."""
    from megatron_bliss.inspection import explain as look

    look.show(run_dir, name, as_json)


@app.command(rich_help_panel=_PANEL)
def inspect(
    run_dir: RunArgument,
    number: Annotated[
        int | None, typer.Option("--round", min=0, help="Number of the round, 0 for the warm-up; the last by default.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Sequences shown of each kind.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """A round's selection: sizes, scores, domains, lengths, other rounds, and its best, borderline and worst."""
    from megatron_bliss.inspection import tables as look

    look.show(run_dir, number, samples, as_json)


@app.command(rich_help_panel=_PANEL)
def export(
    path: Annotated[Path, typer.Argument(metavar="OUT.parquet", help="File to write.")],
    run_dir: RunOption,
    number: RoundOption,
) -> None:
    """A round's candidates with scores, and whether they are kept, as a parquet file."""
    from megatron_bliss.inspection import exchange

    exchange.export(run_dir, number, path)


@app.command("import", rich_help_panel=_PANEL)
def import_selection(
    path: Annotated[Path, typer.Argument(metavar="IN.parquet", help="Has columns shard and id, perhaps kept.")],
    run_dir: RunOption,
    directory: Annotated[Path, typer.Option("--out", help="The selection directory to make.")],
) -> None:
    """A selection of the run's shards from a parquet file, for `python -m megatron_bliss.hooks --selection`."""
    from megatron_bliss.inspection import exchange

    exchange.import_selection(run_dir, path, directory)
