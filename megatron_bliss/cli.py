"""The command line. Thin: it reads words, calls one function and turns errors into exit codes (0 to 3)."""

import enum
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from megatron_bliss import stopping
from megatron_bliss.errors import StageError, StoppedError, UserError, user_errors

app = typer.Typer(
    help="Data selection for LLM pretraining on Megatron-Core: BLISS rounds over binary token shards.",
    epilog="To begin: demo. Or copy configs/bliss-410m.yaml to MY.yaml and fill in the data; then doctor MY.yaml, "
    "run MY.yaml --dry-run, run MY.yaml, inspect RUN. README, 'Where to begin': shards, text, scores alone, Slurm.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunOption = Annotated[Path, typer.Option("--run", help="Directory of the run.")]
RoundOption = Annotated[int, typer.Option("--round", min=1, help="Number of the round, from 1.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of the run.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Launcher(enum.StrEnum):
    """What starts the stages of `run`."""

    local = "local"
    torchrun = "torchrun"


_LOOK = "Selections, looked at and exchanged"
# Stages that save what they have and end when they are asked to (`stopping`); the others are ended at any moment.
_LISTENING = (
    *("warmup-target", "warmup-proxy", "cache-target", "influence", "fit-influence", "ngrams", "bilevel", "score"),
    *("pretrain", "evaluate"),
)
_STAGES = "Stages (what `run` starts; distributed ones under torchrun)"


def _stage(run_dir: Path, command: str, number: int = 0) -> AbstractContextManager[None]:
    """Around a stage's work: what it took is noted in the run; where it can be told to stop, it listens."""
    if command in _LISTENING:
        stopping.listen()
    from megatron_bliss.artifacts import RunPaths
    from megatron_bliss.stages.usage import recorded

    return recorded(RunPaths(run_dir).usage(command, number))


@app.command()
def demo(
    pool: Annotated[Path | None, typer.Option(help="Folder with one NAME.jsonl a domain.")] = None,
    validation: Annotated[Path | None, typer.Option(help="jsonl text that steers the selection.")] = None,
    test: Annotated[Path | None, typer.Option(help="jsonl text for the final measure only.")] = None,
    target_domain: Annotated[
        str | None, typer.Option(help="Domain of the pool that is like the validation text, for the AUC.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 1,
    arms: Annotated[str, typer.Option(help="Arms by name, with commas.")] = "bliss,random,high_loss",
    out: Annotated[Path, typer.Option(help="Directory of the run.")] = Path("runs/demo"),
) -> None:
    """The whole method on text this machine already has, or on yours; ends in a table and report.html."""
    from megatron_bliss import demo as demonstration

    names = tuple(arm.strip() for arm in arms.split(","))
    demonstration.run(demonstration.Experiment(pool, validation, test, target_domain, seed, names, out))


@app.command()
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's settings, YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over CONFIG's.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run", help="Directory of the run; runs/<name of CONFIG> by default.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print stages, sizes, tokens, FLOPs, memory of a rank and disk.")
    ] = False,
    launcher: Annotated[
        Launcher, typer.Option(help="local, or torchrun: started on several machines, which share the run's directory.")
    ] = Launcher.local,
    nnodes: Annotated[
        int | None, typer.Option(envvar=["GROUP_WORLD_SIZE", "PET_NNODES"], help="torchrun: number of machines.")
    ] = None,
    node_rank: Annotated[
        int | None,
        typer.Option(envvar=["GROUP_RANK", "PET_NODE_RANK"], help="torchrun: this machine's number, from 0."),
    ] = None,
    rdzv_endpoint: Annotated[
        str | None,
        typer.Option(envvar="PET_RDZV_ENDPOINT", help="torchrun: HOST:PORT of machine 0; 64 more ports are used."),
    ] = None,
) -> None:
    """All rounds on this machine, or on several; called again, it does what is missing."""
    from megatron_bliss.config import load_config
    from megatron_bliss.orchestration import cost, local, nodes, slurm

    together, words = None, overrides or []
    if launcher is Launcher.torchrun:
        together = nodes.Nodes.of(nnodes, node_rank, rdzv_endpoint or nodes.endpoint_of_torchrun())
        words = [*words, f"launch.nnodes={together.count}"]
    settings = load_config(config, words)
    directory = run_dir or Path("runs") / config.stem
    if dry_run:
        cost.show(settings, directory)
        return
    slurm.refuse_if_queued(directory.absolute())
    if together is None:
        local.run(settings, directory)
    elif together.rank == 0:
        nodes.lead(settings, directory, together)
    else:
        nodes.follow(settings, directory, together)


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's settings, YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over CONFIG's.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run", help="Directory of the run; runs/<name of CONFIG> by default.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the jobs, and whether they can work.")] = False,
) -> None:
    """All rounds as a chain of Slurm jobs; called again, it replaces jobs that ended before their stage was done."""
    from megatron_bliss.config import load_config
    from megatron_bliss.orchestration import slurm, slurm_limits

    settings = load_config(config, overrides or [])
    directory = (run_dir or Path("runs") / config.stem).absolute()
    if dry_run:
        slurm_limits.show(settings, directory)
    else:
        slurm_limits.check_all(settings, directory, slurm.requests(settings, directory))
        slurm.submit(settings, directory)


@app.command()
def cancel(run_dir: RunArgument) -> None:
    """End all Slurm jobs of a run; `submit` goes on from there."""
    from megatron_bliss.orchestration import slurm

    slurm.cancel(run_dir.absolute())


@app.command(hidden=True, context_settings={"ignore_unknown_options": True})
def job(
    event: Annotated[str, typer.Argument(metavar="begin|watch|end")],
    log: Annotated[Path, typer.Argument(metavar="LOG")],
    words: Annotated[list[str], typer.Argument(metavar="STAGE --run DIR…")],
    exit_code: Annotated[int, typer.Option("--exit-code")] = 0,
    max_attempts: Annotated[int, typer.Option("--max-attempts")] = 5,
    hang_minutes: Annotated[float, typer.Option("--hang-minutes")] = 0,
) -> None:
    """What launch/common.sh asks around a stage."""
    from megatron_bliss.orchestration import slurm_job

    if event == "begin":
        typer.echo(slurm_job.begin(words, log, max_attempts))
    elif event == "watch":
        slurm_job.watch(words, log, hang_minutes)
    else:
        typer.echo(slurm_job.end(words, exit_code, log, max_attempts))


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The comparison, YAML: run, seeds, arms.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the runs, or seeds=[1,2].")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory of the comparison; runs/<name of CONFIG> by default.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print arms, stages, FLOPs and what is missing.")
    ] = False,
) -> None:
    """Methods beside each other, with several seeds; called again, with more arms or seeds, it does what is missing."""
    from megatron_bliss.config import load_comparison
    from megatron_bliss.orchestration import compare as comparison
    from megatron_bliss.report import comparison_page

    asked = load_comparison(config, overrides or [])
    directory = out or Path("runs") / config.stem
    if dry_run:
        comparison.show(asked, directory)
    else:
        comparison.run(asked, directory)
        comparison_page.write(directory)


@app.command()
def status(run_dir: RunArgument) -> None:
    """One table: stages, times, losses, what is running, what failed and where its log is."""
    from megatron_bliss.orchestration import status as table

    table.show(run_dir)


@app.command()
def report(run_dir: RunArgument) -> None:
    """Write report.html, its report.json and result.json of a run, or a comparison's html and json; finished or not."""
    from megatron_bliss.orchestration.compare import seed_dirs
    from megatron_bliss.report import comparison_page, page, result

    if seed_dirs(run_dir):
        comparison_page.write(run_dir)
        return
    result.write(run_dir)
    page.write(run_dir)
    typer.echo(run_dir / "report.html")


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="Settings of a run, YAML.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over CONFIG's.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run", help="Directory of the run; its settings are taken without CONFIG.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Look at all tokens of all shards, not at samples.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What is installed and works here, what each gap costs and what closes it; exit code 2 if CONFIG cannot run."""
    from megatron_bliss.doctor import examination

    if not examination.show(config, overrides or [], run_dir, full, as_json):
        raise typer.Exit(2)


@app.command(rich_help_panel=_LOOK)
def explain(
    name: Annotated[str, typer.Argument(metavar="SHARD:ID", help="A shard's name or prefix, and a sequence of it.")],
    run_dir: RunOption,
    as_json: JsonOption = False,
) -> None:
    """One sequence: its text, score, rank, whether it is kept and why not, and the LLM's steps that read it."""
    from megatron_bliss.inspection import explain as look

    look.show(run_dir, name, as_json)


@app.command(rich_help_panel=_LOOK)
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


@app.command(rich_help_panel=_LOOK)
def export(
    path: Annotated[Path, typer.Argument(metavar="OUT.parquet", help="File to write.")],
    run_dir: RunOption,
    number: RoundOption,
) -> None:
    """A round's candidates with scores, and whether they are kept, as a parquet file."""
    from megatron_bliss.inspection import exchange

    exchange.export(run_dir, number, path)


@app.command("import", rich_help_panel=_LOOK)
def import_selection(
    path: Annotated[Path, typer.Argument(metavar="IN.parquet", help="Has columns shard and id, perhaps kept.")],
    run_dir: RunOption,
    directory: Annotated[Path, typer.Option("--out", help="The selection directory to make.")],
) -> None:
    """A selection of the run's shards from a parquet file, for `python -m megatron_bliss.hooks --selection`."""
    from megatron_bliss.inspection import exchange

    exchange.import_selection(run_dir, path, directory)


@app.command(rich_help_panel=_STAGES)
def inventory(run_dir: RunOption) -> None:
    """Check and hash every shard."""
    with _stage(run_dir, "inventory"):
        from megatron_bliss.stages import inventory as stage

        stage.run(run_dir)


@app.command(rich_help_panel=_STAGES)
def warmup_select(run_dir: RunOption) -> None:
    """A random part of slice 0 for the warm-up."""
    with _stage(run_dir, "warmup-select"):
        from megatron_bliss.stages import select as stage

        stage.run(run_dir, None)


@app.command(rich_help_panel=_STAGES)
def warmup_target(run_dir: RunOption) -> None:
    """Train the LLM on the warm-up's data."""
    with _stage(run_dir, "warmup-target"):
        from megatron_bliss.stages import pretrain as stage

        stage.run(run_dir, 0)


@app.command(rich_help_panel=_STAGES)
def warmup_proxy(run_dir: RunOption) -> None:
    """Train the proxy on the warm-up's data."""
    with _stage(run_dir, "warmup-proxy"):
        from megatron_bliss.stages import warmup_proxy as stage

        stage.run(run_dir)


@app.command(name="cache-target", rich_help_panel=_STAGES)
def cache_target(run_dir: RunOption, number: RoundOption) -> None:
    """Write what the target says of a round's bilevel sample, where bilevel.kl_source is cached."""
    with _stage(run_dir, "cache-target", number):
        from megatron_bliss.stages import cache_target as stage

        stage.run(run_dir, number)


@app.command(rich_help_panel=_STAGES)
def influence(run_dir: RunOption, number: RoundOption) -> None:
    """Measure what steps on a sample of the round's slice do to the validation loss, for method mates."""
    with _stage(run_dir, "influence", number):
        from megatron_bliss.stages import influence as stage

        stage.run(run_dir, number)


@app.command(name="fit-influence", rich_help_panel=_STAGES)
def fit_influence(run_dir: RunOption, number: RoundOption) -> None:
    """Fit the score model to what influence has measured, for method mates."""
    with _stage(run_dir, "fit-influence", number):
        from megatron_bliss.stages import fit_influence as stage

        stage.run(run_dir, number)


@app.command(rich_help_panel=_STAGES)
def ngrams(run_dir: RunOption, number: RoundOption) -> None:
    """Count the n-grams of the round's slice and of the validation set, for method dsir."""
    with _stage(run_dir, "ngrams", number):
        from megatron_bliss.stages import ngrams as stage

        stage.run(run_dir, number)


@app.command(rich_help_panel=_STAGES)
def bilevel(run_dir: RunOption, number: RoundOption) -> None:
    """Learn the score model by the bilevel loop."""
    with _stage(run_dir, "bilevel", number):
        from megatron_bliss.stages import bilevel as stage

        stage.run(run_dir, number)


@app.command(rich_help_panel=_STAGES)
def score(run_dir: RunOption, number: RoundOption) -> None:
    """Score every sequence of the round's slice."""
    with _stage(run_dir, "score", number):
        from megatron_bliss.stages import score as stage

        stage.run(run_dir, number)


@app.command(rich_help_panel=_STAGES)
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
    with _stage(run_dir, "select", number):
        stage.run(run_dir, number)


@app.command(rich_help_panel=_STAGES)
def prepare(
    run_dir: RunOption,
    number: Annotated[int, typer.Option("--round", min=0, help="Number of the round; 0 is the warm-up.")],
) -> None:
    """Build Megatron's index files for the round's training, without a GPU."""
    with _stage(run_dir, "prepare", number):
        from megatron_bliss.stages import prepare as stage

        stage.run(run_dir, number)


@app.command(rich_help_panel=_STAGES)
def pretrain(run_dir: RunOption, number: RoundOption) -> None:
    """Continue the LLM on the round's selection, by Megatron's own trainer."""
    with _stage(run_dir, "pretrain", number):
        from megatron_bliss.stages import pretrain as stage

        stage.run(run_dir, number)


@app.command(rich_help_panel=_STAGES)
def evaluate(run_dir: RunOption, number: RoundOption) -> None:
    """Measure the LLM at the end of the round, on a decay branch."""
    with _stage(run_dir, "evaluate", number):
        from megatron_bliss.stages import evaluate as stage

        stage.run(run_dir, number)


@app.command(rich_help_panel=_STAGES)
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


def main() -> None:
    """Exit codes: 0 done, 1 failed, 2 bad usage or input, 3 stopped before the end: call again."""
    if "MEGATRON_BLISS_STAGE" in os.environ:
        from megatron_bliss.orchestration.bound import die_with_parent

        die_with_parent()
    with user_errors():
        try:
            app()
        except StageError as failure:
            print(failure, file=sys.stderr, flush=True)
            raise SystemExit(1) from None
        except StoppedError as end:
            print(end, file=sys.stderr, flush=True)
            raise SystemExit(stopping.EXIT_CODE) from None


if __name__ == "__main__":
    main()
