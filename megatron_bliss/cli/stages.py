"""Commands that are the stages of a run: what launchers start."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from megatron_bliss import stopping
from megatron_bliss.cli.options import RoundOption, RunOption
from megatron_bliss.errors import UserError

app = typer.Typer()
_PANEL = "Stages (what `run` starts; distributed ones under torchrun)"


def _stage(command: str, listens: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A function as the command of a stage.

    One that listens saves what it has and ends when it is asked to (`stopping`); the others are ended at any moment.
    """

    def register(work: Callable[..., None]) -> Callable[..., None]:
        @app.command(command, rich_help_panel=_PANEL)
        @functools.wraps(work)
        def called(run_dir: Path, **number: int) -> None:
            if listens:
                stopping.listen()
            with _recorded(run_dir, command, **number):
                work(run_dir, **number)

        return called

    return register


def _recorded(run_dir: Path, command: str, number: int = 0) -> AbstractContextManager[None]:
    """Around a stage's work: what it took is noted in the run."""
    from megatron_bliss.artifacts import RunPaths
    from megatron_bliss.stages.usage import recorded

    return recorded(RunPaths(run_dir).usage(command, number))


@_stage("inventory")
def inventory(run_dir: RunOption) -> None:
    """Check and hash every shard."""
    from megatron_bliss.stages import inventory as stage

    stage.run(run_dir)


@_stage("warmup-select")
def warmup_select(run_dir: RunOption) -> None:
    """A random part of slice 0 for the warm-up."""
    from megatron_bliss.stages import select as stage

    stage.run(run_dir, None)


@_stage("warmup-target", listens=True)
def warmup_target(run_dir: RunOption) -> None:
    """Train the LLM on the warm-up's data."""
    from megatron_bliss.stages import pretrain as stage

    stage.run(run_dir, 0)


@_stage("warmup-proxy", listens=True)
def warmup_proxy(run_dir: RunOption) -> None:
    """Train the proxy on the warm-up's data."""
    from megatron_bliss.stages import warmup_proxy as stage

    stage.run(run_dir)


@_stage("cache-target", listens=True)
def cache_target(run_dir: RunOption, number: RoundOption) -> None:
    """Write what the target says of a round's bilevel sample, where bilevel.kl_source is cached."""
    from megatron_bliss.stages import cache_target as stage

    stage.run(run_dir, number)


@_stage("influence", listens=True)
def influence(run_dir: RunOption, number: RoundOption) -> None:
    """Measure what steps on a sample of the round's slice do to the validation loss, for method mates."""
    from megatron_bliss.stages import influence as stage

    stage.run(run_dir, number)


@_stage("fit-influence", listens=True)
def fit_influence(run_dir: RunOption, number: RoundOption) -> None:
    """Fit the score model to what influence has measured, for method mates."""
    from megatron_bliss.stages import fit_influence as stage

    stage.run(run_dir, number)


@_stage("ngrams", listens=True)
def ngrams(run_dir: RunOption, number: RoundOption) -> None:
    """Count the n-grams of the round's slice and of the validation set, for method dsir."""
    from megatron_bliss.stages import ngrams as stage

    stage.run(run_dir, number)


@_stage("bilevel", listens=True)
def bilevel(run_dir: RunOption, number: RoundOption) -> None:
    """Learn the score model by the bilevel loop."""
    from megatron_bliss.stages import bilevel as stage

    stage.run(run_dir, number)


@_stage("fidelity", listens=True)
def fidelity(run_dir: RunOption, number: RoundOption) -> None:
    """Measure whether what helps the proxy, and what scores highest, helps the LLM."""
    from megatron_bliss.stages import fidelity as stage

    stage.run(run_dir, number)


@_stage("score", listens=True)
def score(run_dir: RunOption, number: RoundOption) -> None:
    """Score every sequence of the round's slice."""
    from megatron_bliss.stages import score as stage

    stage.run(run_dir, number)


@app.command(rich_help_panel=_PANEL)
def select(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="With --scores: settings, as fraction=0.1.")
    ] = None,
    run_dir: Annotated[Path | None, typer.Option("--run", help="Directory of the run.")] = None,
    number: Annotated[int | None, typer.Option("--round", min=1, help="Number of the round, from 1.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be kept, by domain.")] = False,
    scores: Annotated[Path | None, typer.Option(help="Scores that tools/score_shards.py wrote, without a run.")] = None,
    output: Annotated[Path | None, typer.Option(help="With --scores: directory for the selection.")] = None,
    earlier: Annotated[
        list[Path] | None, typer.Option(help="With --scores: a selection whose sequences are taken; may be repeated.")
    ] = None,
) -> None:
    """Keep the best part of a round's candidates, or of scored shards."""
    from megatron_bliss.stages import select as stage
    from megatron_bliss.stages import select_scores

    if scores is not None:
        if run_dir or number:
            raise UserError(f"--scores {scores} goes without --run and --round; leave out one or the other")
        select_scores.run(scores, output, overrides or [], earlier or [], dry_run)
        return
    if run_dir is None or number is None:
        raise UserError("select needs --run DIR and --round N, or --scores DIR and --output DIR")
    if overrides or output or earlier:
        raise UserError(f"{run_dir} has its settings in run.yaml; KEY=VALUE, --output and --earlier go with --scores")
    if dry_run:
        stage.run(run_dir, number, dry_run=True)
        return
    with _recorded(run_dir, "select", number):
        stage.run(run_dir, number)


@_stage("prepare")
def prepare(
    run_dir: RunOption,
    number: Annotated[int, typer.Option("--round", min=0, help="Number of the round; 0 is the warm-up.")],
) -> None:
    """Build Megatron's index files for the round's training, without a GPU."""
    from megatron_bliss.stages import prepare as stage

    stage.run(run_dir, number)


@_stage("pretrain", listens=True)
def pretrain(run_dir: RunOption, number: RoundOption) -> None:
    """Continue the LLM on the round's selection, by Megatron's own trainer."""
    from megatron_bliss.stages import pretrain as stage

    stage.run(run_dir, number)


@_stage("evaluate", listens=True)
def evaluate(run_dir: RunOption, number: RoundOption) -> None:
    """Measure the LLM at the end of the round, on a decay branch."""
    from megatron_bliss.stages import evaluate as stage

    stage.run(run_dir, number)


@app.command(rich_help_panel=_PANEL)
def benchmark(
    run_dir: Annotated[Path | None, typer.Option("--run", help="Directory of the run.")] = None,
    number: Annotated[int | None, typer.Option("--round", min=1, help="Number of the round, from 1.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, with commas; the papers' nine by default.")
    ] = None,
    task_files: Annotated[Path | None, typer.Option(help="A directory with task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task at most.")] = None,
    prefetch: Annotated[
        bool, typer.Option("--prefetch", help="Only download the tasks' data, for nodes without a network.")
    ] = False,
) -> None:
    """Measure the LLM that `evaluate` measures on downstream tasks, zero-shot, by lm-evaluation-harness."""
    from megatron_bliss.stages import benchmark as stage

    names = tasks.split(",") if tasks else list(stage.TASKS)
    if prefetch:
        stage.prefetch(names, task_files)
    elif run_dir is None or number is None:
        raise UserError("benchmark needs --run DIR and --round N, or --prefetch")
    else:
        stage.run(run_dir, number, names, task_files, limit)
