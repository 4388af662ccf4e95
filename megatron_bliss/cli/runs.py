"""Commands on whole runs: to start and end them, to compare them, and to see how they are."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from megatron_bliss.cli.options import JsonOption, RunArgument

app = typer.Typer()

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's settings, YAML.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over CONFIG's.")
]
NewRunOption = Annotated[
    Path | None, typer.Option("--run", help="Directory of the run; runs/<name of CONFIG> by default.")
]


class Launcher(enum.StrEnum):
    """What starts the stages of `run`."""

    local = "local"
    torchrun = "torchrun"


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
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    run_dir: NewRunOption = None,
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
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    run_dir: NewRunOption = None,
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
    overrides: OverridesArgument = None,
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
