"""`megatron-bliss compare`: one run a seed, OUT/seed-N, with all arms in it; what is there already is not done again.

Arms of a seed share pool, warm start, tokens and schedule, so their differences are paired. Arms and seeds may be added
later: a run takes new control arms, and a new seed is a new run.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_bliss.artifacts import RunPaths, run_lock
from megatron_bliss.config import Comparison, RunConfig, differences, read_saved_config
from megatron_bliss.data import demo_corpus, experiment_corpus
from megatron_bliss.errors import UserError
from megatron_bliss.orchestration import cost, local, state
from megatron_bliss.orchestration.check import check
from megatron_bliss.orchestration.plan import Arm, Stage, arms, plan
from megatron_bliss.wording import counted

_WIDTH = 120  # of the table where there is no terminal
_CORPUS_SEED = 1  # of a corpus made here: one pool for all seeds
_CORPUS_VOCAB_SIZE = 2048
_UNKNOWN = {  # in place of a corpus that is not made yet
    "pool": [{"name": "demo", "prefixes": ["corpus"]}],
    "validation": "corpus/validation",
    "test": "corpus/test",
    "tokenizer": {"model": "corpus/tokenizer.model", "vocab_size": _CORPUS_VOCAB_SIZE},
}


def seed_dirs(out: Path) -> dict[int, Path]:
    """The runs of a comparison that were started, by seed."""
    found = {path.parent.name.removeprefix("seed-"): path.parent for path in out.glob("seed-*/run.yaml")}
    return {int(seed): found[seed] for seed in sorted((name for name in found if name.isdigit()), key=int)}


def run(comparison: Comparison, out: Path) -> None:
    """Do whatever the comparison still lacks.

    :raises UserError: if its settings cannot work, or the directory holds another comparison.
    :raises StageError: if a stage failed, or this was interrupted.
    """
    out = out.absolute()
    with run_lock(out / "compare.lock"):
        data = _corpus(comparison, out) if comparison.corpus else None
        configs = {seed: comparison.run_config(seed, data) for seed in comparison.seeds}
        check_is_same(configs, out)
        local.run_all({out / f"seed-{seed}": config for seed, config in configs.items()}, out)


def check_is_same(configs: Mapping[int, RunConfig], out: Path) -> None:
    """Every run in the directory is the same but for its seed, its arms, and how its stages are launched; and so are
    arms of one name.

    :raises UserError: naming what differs.
    """
    now = next(iter(configs.values()))
    ours = {control.name: control for control in now.controls}
    for seed, run_dir in seed_dirs(out).items():
        saved = read_saved_config(RunPaths(run_dir).config)
        changed = differences(
            replace(saved, seed=now.seed, launch=now.launch, tracking=now.tracking, controls=[]),
            replace(now, controls=[]),
        )
        for control in saved.controls:
            if ours.get(control.name, control) != control:
                changed.append(f"arm {control.name}: {control} -> {ours[control.name]}")
        if changed:
            raise UserError(
                f"{out} holds another comparison (seed {seed}: {'; '.join(changed)}); undo the change, give a changed "
                "arm another name, or give a directory of its own with --out"
            )


def _corpus(comparison: Comparison, out: Path) -> dict[str, Any]:
    """Settings under `data` for the built-in corpus, which is made if it is not there."""
    unknown = comparison.run_config(comparison.seeds[0], _UNKNOWN)  # settings are refused before any work
    texts = out / "corpus" / "text"
    demo_corpus.build(texts, seed=_CORPUS_SEED)
    corpus = experiment_corpus.prepare(
        texts / "pool",
        texts / "validation.jsonl",
        texts / "test.jsonl",
        out / "corpus",
        vocab_size=_CORPUS_VOCAB_SIZE,
        cut=unknown.data.sequence_length,
        seed=_CORPUS_SEED,
        num_workers=unknown.launch.concurrency,
        is_in_use=bool(seed_dirs(out)),
    )
    return {
        "pool": [{"name": name, "prefixes": [prefix]} for name, prefix in corpus.pool.items()],
        "validation": corpus.validation,
        "test": corpus.test,
        "tokenizer": {"model": corpus.tokenizer, "vocab_size": corpus.vocab_size},
    }


def show(comparison: Comparison, out: Path) -> None:
    """Print the table of `--dry-run`: stages and floating-point operations by arm, for all seeds; and the hours, from
    how fast this comparison's finished stages were.

    :raises UserError: for settings that cannot work, or a directory that holds another comparison.
    """
    is_made = comparison.corpus is None or (out / "corpus" / "corpus.json").exists()
    data = (_corpus(comparison, out) if is_made else _UNKNOWN) if comparison.corpus else None
    configs = {seed: comparison.run_config(seed, data) for seed in comparison.seeds}
    if is_made:
        check_is_same(configs, out)
    first = next(iter(configs.values()))
    for seed, config in configs.items():
        check(config, out / f"seed-{seed}")
    pool, reason = cost.measure(first)
    compared, seeds = counted(len(first.controls) + 1, "arm"), ", ".join(map(str, configs))
    title = f"{out}: {compared}, seeds {seeds}; all seeds together"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("arm", "stages", "missing", "selection FLOPs", "training FLOPs", "evaluation FLOPs"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    names = {arm.name: arm.prefix for arm in arms(first, out)}
    stages = {seed: plan(config, out / f"seed-{seed}") for seed, config in configs.items()}
    missing = {
        seed: {stage.name for stage in stages[seed] if not _is_done(out / f"seed-{seed}", stage)} for seed in configs
    }
    total = 0.0
    for arm in arms(first, out / "seed"):
        flops = _flops(arm, pool, [stage.name for stage in next(iter(stages.values()))])
        own = [stage.name for seed in stages for stage in stages[seed] if _belongs(stage.name, names[arm.name])]
        left = [name for seed in missing for name in missing[seed] if _belongs(name, names[arm.name])]
        cells = [f"{part * len(configs):.2e}" if part is not None else "?" for part in flops]
        table.add_row(arm.name, str(len(own)), str(len(left)), *cells)
        total += sum(part or 0.0 for part in flops) * len(configs)
    table.add_section()
    table.add_row(
        "in all", str(sum(map(len, stages.values()))), str(sum(map(len, missing.values()))), "", f"{total:.2e}"
    )
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    console.print(table)
    console.print(_time_left(configs, stages, missing, out), soft_wrap=True, highlight=False)
    if not is_made:
        reason = f"{out / 'corpus'} is made when the comparison is started"
    if reason:
        console.print(f"the pool's size is not known, so numbers are missing above: {reason}", soft_wrap=True)


def _belongs(name: str, prefix: str) -> bool:
    """Whether a stage is an arm's; the main arm has those of no control."""
    return name.startswith(prefix) if prefix else not name.startswith("controls/")


def _is_done(run_dir: Path, stage: Stage) -> bool:
    return state.why_not_done(run_dir, stage, state.read_state(run_dir).get(stage.name)) is None


def _flops(arm: Arm, pool: cost.PoolSize | None, planned: list[str]) -> list[float | None]:
    """Of an arm's own stages in one run, for selection, training and evaluation; None where the pool is not known."""
    sums: dict[str, float | None] = {"selection": 0.0, "training": 0.0, "evaluation": 0.0}
    for name, found in cost.arm_costs(arm, pool).items():
        command = name.rpartition("/")[2]
        kind = {"evaluate": "evaluation", "pretrain": "training", "warmup-target": "training"}.get(command, "selection")
        known = sums[kind]
        if name in planned:
            sums[kind] = None if known is None or found.flops is None else known + found.flops
    return list(sums.values())


def _time_left(
    configs: Mapping[int, RunConfig], stages: Mapping[int, list[Stage]], missing: Mapping[int, set[str]], out: Path
) -> str:
    """In words, from the mean time of finished stages of the same command."""
    took: dict[str, list[float]] = {}
    for seed in configs:
        records = state.read_state(out / f"seed-{seed}")
        for stage in stages[seed]:
            record = records.get(stage.name)
            if record and record.status == "done" and record.started is not None and record.finished is not None:
                took.setdefault(stage.command[0], []).append(record.finished - record.started)
    left = [stage.command[0] for seed in configs for stage in stages[seed] if stage.name in missing[seed]]
    if not left:
        return "nothing is missing"
    if unknown := sorted(set(left) - set(took)):
        return f"how long it takes is known once these have run: {', '.join(unknown)}"
    concurrency = next(iter(configs.values())).launch.concurrency
    hours = sum(sum(took[command]) / len(took[command]) for command in left) / concurrency / 3600
    return (
        f"about {hours:.2g} hours for what is missing, by the mean time of finished stages, {concurrency} side by side"
    )
