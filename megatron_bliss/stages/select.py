"""`select`: keep the best part of a round's candidates, or of any scored shards; `warmup-select`: a random part of
slice 0."""

import os
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_bliss.artifacts import RunPaths, digest_file, digest_tree
from megatron_bliss.config import RunConfig, SelectionConfig, TokenizerConfig, read_saved_config, warmup_run
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.ledger import Ledger
from megatron_bliss.data.scores import ScoreFiles
from megatron_bliss.data.seeds import derive
from megatron_bliss.data.selection import Counts, Selection
from megatron_bliss.data.slices import Slicing
from megatron_bliss.errors import UserError
from megatron_bliss.methods import offline_method
from megatron_bliss.methods.offline import OfflineMethod
from megatron_bliss.methods.random import Random
from megatron_bliss.stages.choice import Choice, Chosen, choose
from megatron_bliss.stages.guards import RANDOM, ROLLBACK, STOP, Guarded, describe, guarded
from megatron_bliss.stages.inventory import run_inventory
from megatron_bliss.stages.sources import find_model, is_model, model_directory, target_iteration
from megatron_bliss.tracking import Job, track

_WIDTH = 120  # where there is no terminal


def run(run_dir: Path, round_number: int | None, dry_run: bool = False) -> None:
    """Write a round's selection, or for None the warm-up's, unless a run is started from another one's warm-up.

    The result depends on settings, shards, scores and, with `selection.pool: all`, earlier selections alone, so a
    selection that is there already is written again to the same bytes.

    :param dry_run: print what would be kept, and write nothing.
    :raises UserError: if scores are missing or unfinished, a shard changed, or less than is asked for can be kept.
    """
    paths = RunPaths(Path(run_dir))
    config = read_saved_config(paths.config)
    if round_number is None and config.warmup.start_from:
        return
    directory = paths.warmup_selection if round_number is None else paths.selection(round_number)
    choice = round_choice(paths, config, round_number)
    finish(choice, directory, dry_run)
    if not dry_run:
        job = Job(config, paths, "select" if round_number else "warmup-select", round_number)
        tracker = track(job)
        tracker.log_selection(directory, f"{job.group}/{job.name}")
        tracker.close()


def finish(choice: Choice, directory: Path, dry_run: bool) -> None:
    """Select, write it unless told otherwise, and say what came of it."""
    chosen = choose(choice, None if dry_run else directory)
    if dry_run:
        show(choice, chosen)
    _say(choice, chosen)


def round_choice(paths: RunPaths, config: RunConfig, round_number: int | None) -> Choice:
    """What a round's selection is made of and by; for None, the warm-up's.

    :raises UserError: if the run has no such round, or scores or an earlier selection that is needed are missing.
    """
    if round_number is not None and round_number > config.rounds:
        raise UserError(f"{paths.root} has rounds 1 to {config.rounds}; there is no round {round_number}")
    inventory = run_inventory(paths.root, config)
    seed = selection_seed(config, paths, round_number)
    slicing, number = Slicing.of(config, inventory), round_number or 0
    found = guarded(paths, number) if number else None
    method = round_method(config, found) if number else Random()
    settings = method.settings(config.selection) if number else warmup_settings(config)
    files = None
    if method.scored_by != "none":
        is_rolled_back = found is not None and found.action == ROLLBACK
        files = ScoreFiles(paths.rollback_scores(number) if is_rolled_back else paths.scores(number))
        _check_scores(files, method, config)
        _check_model(files, model_directory(paths, config, found.trusted_round if found else number))
    ledger = Ledger() if method.takes_all else _ledger(paths, config, number)
    return Choice(
        stage="warmup-select" if round_number is None else "select",
        records=inventory.pool,
        method=method,
        settings=settings,
        wanted=lambda record, span: slicing.ids(record, number, span),
        scores=files.read if files else lambda record, ids: method.score_without_model(record, ids, seed),
        seed=seed,
        verify_scores=files.verify if files else lambda record: None,
        ledger=ledger,
        weights={domain.name: domain.weight for domain in config.data.pool if domain.weight is not None} or None,
        facts={
            "round": number,
            "tokenizer": tokenizer_facts(config.data.tokenizer),
            "score_model": files.model_digest if files else None,
            "target": _target(paths, config, round_number),
            "sources": _sources(inventory, files, ledger),
            **({"guard": asdict(found)} if found else {}),
        },
    )


def round_method(config: RunConfig, found: Guarded | None) -> OfflineMethod:
    """By which a round is selected.

    :param found: what guards did in it.
    :raises UserError: if they stopped the run there.
    """
    if found and found.action == STOP:
        raise UserError(
            f"guards stopped the run here: {' '.join(found.reasons)} Call it again with guards.action=random, rollback "
            "or none, so that the round's score stage decides anew"
        )
    return Random() if found and found.action == RANDOM else offline_method(config)


def _target(paths: RunPaths, config: RunConfig, round_number: int | None) -> dict[str, int] | None:
    """The checkpoint of the LLM that the score model has learned with, and by how many of its steps that was older than
    what the round begins with; None if the LLM had no part in it."""
    if round_number is None or offline_method(config).learns != "bilevel" or not config.bilevel.gamma:
        return None
    iteration = target_iteration(paths, config, round_number)
    return {"iteration": iteration, "staleness": config.round_end(round_number - 1) - iteration}


def _sources(inventory: Inventory, files: ScoreFiles | None, ledger: Ledger) -> dict[str, str]:
    sources = {"inventory": inventory.digest}
    if files is not None:
        sources["scores"] = files.digest
    if ledger.num_rounds:
        sources["earlier selections"] = ledger.digest
    return sources


def _check_scores(files: ScoreFiles, method: OfflineMethod, config: RunConfig) -> None:
    remedy = "remove the directory and run the score stage again"
    if files.method != method.name:
        raise UserError(
            f"{files.directory} holds scores of {files.method!r}, this run selects by {method.name!r}; {remedy}"
        )
    model = config.data.tokenizer.model
    if files.tokenizer is not None and files.tokenizer["model_sha256"] and model and not Path(model).exists():
        raise UserError(
            f"data.tokenizer.model {model} is not there, seen from {Path.cwd()}; call this from where the run was "
            "started, or give an absolute path"
        )
    if files.tokenizer is not None and files.tokenizer != tokenizer_facts(config.data.tokenizer):
        raise UserError(f"{files.directory} holds scores made with another tokenizer than data.tokenizer; {remedy}")


def _check_model(files: ScoreFiles, directory: Path) -> None:
    """Scores are those of the model that is there now; where there is none, they come from elsewhere."""
    if is_model(directory) and files.model_digest != digest_tree(model := find_model(directory)):
        raise UserError(f"{files.directory} holds scores of another model than {model}; run the score stage again")


def warmup_settings(config: RunConfig) -> SelectionConfig:
    """Those of the warm-up's random draw."""
    return replace(
        config.selection,
        fraction=config.warmup.fraction,
        tokens=None,
        threshold=None,
        quotas={},
        temperature=0.0,
        pool="slice",
        max_repeats=1,
    )


def _ledger(paths: RunPaths, config: RunConfig, round_number: int) -> Ledger:
    """What the rounds before took, if they select from the same sequences; the warm-up too, if the LLM was trained on
    it."""
    if config.selection.pool != "all" or not round_number:
        return Ledger()
    directories = [paths.selection(number) for number in range(1, round_number)]
    if config.warmup.target_steps:
        directories.insert(0, warmup_run(config, paths).warmup_selection)
    return Ledger([Selection.open(directory) for directory in directories])


def selection_seed(config: RunConfig, paths: RunPaths, round_number: int | None) -> int:
    """Seed of a selection's draws: another one for each run (main or control arm), round and stage."""
    arm = f"control {paths.root.resolve().name}" if config.warmup.start_from else "main"
    if round_number is None:
        return derive(config.seed, arm, "warmup-select")
    return derive(config.seed, arm, "select", round_number)


def tokenizer_facts(tokenizer: TokenizerConfig) -> dict[str, str | int | None]:
    """What tells a tokenizer from others, for manifests."""
    file = Path(tokenizer.model) if tokenizer.model else None
    return {
        "type": tokenizer.type,
        "model_sha256": digest_file(file) if file and file.is_file() else None,
        "vocab_size": tokenizer.vocab_size,
    }


def show(choice: Choice, chosen: Chosen) -> None:
    """A table by domain: candidates, what is kept of them, the threshold and the share of the blend."""
    table = Table(title=f"{choice.stage}: {choice.method.name}, nothing written")
    for name in ("domain", "candidates", "their tokens", "kept", "kept tokens", "share", "threshold", "blend"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    totals = {domain: Counts(0, 0, 0, 0) for domain in choice.domains}
    weights = dict.fromkeys(choice.domains, 0.0)
    for record, counts, weight in zip(choice.records, chosen.counts, chosen.weights, strict=True):
        totals[record.domain] += counts
        weights[record.domain] += weight
    kept = sum(counts.kept_tokens for counts in chosen.counts)
    for domain, counts in totals.items():
        threshold = chosen.thresholds[domain]
        table.add_row(
            domain,
            f"{counts.slice_sequences:,}",
            f"{counts.slice_tokens:,}",
            f"{counts.kept_sequences:,}",
            f"{counts.kept_tokens:,}",
            f"{counts.kept_tokens / kept:.2%}",
            "" if threshold is None else f"{threshold:.6g}",
            f"{weights[domain]:.2%}",
        )
    Console(width=None if os.isatty(1) else _WIDTH).print(table)


def _say(choice: Choice, chosen: Chosen) -> None:
    total = sum(chosen.counts, Counts(0, 0, 0, 0))
    if guard := choice.facts.get("guard"):
        print(f"[{choice.stage}] guards: {describe(Guarded(**guard), choice.facts['round'])}", flush=True)
    names = zip(choice.records, chosen.counts, strict=True)
    dropped = [record.prefix for record, counts in names if not counts.kept_tokens]
    line = (
        f"[{choice.stage}] {choice.method.name} keeps {total.kept_sequences} of {total.slice_sequences} sequences, "
        f"{total.kept_tokens} of {total.slice_tokens} tokens"
    )
    if dropped:
        line += f"; nothing of {', '.join(dropped)}, left out of the blend"
    print(line, flush=True)
    if chosen.repeated_tokens:
        print(
            f"[{choice.stage}] the pool ran out of sequences that no round has taken: {chosen.repeated_tokens} tokens "
            f"are taken again, the least used first (selection.max_repeats={choice.settings.max_repeats})",
            flush=True,
        )
