"""The demo: the whole method on text, next to a random control and the simple rule "keep the highest loss".

Everything runs through the same stages, launcher and files as a real run; only the sizes are small. The built-in corpus
takes the same road as a user's own jsonl files.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from megatron_bliss import config as settings
from megatron_bliss.artifacts import RunPaths, read_json, run_lock, write_json
from megatron_bliss.data import demo_corpus, experiment_corpus
from megatron_bliss.errors import UserError
from megatron_bliss.orchestration import local
from megatron_bliss.report import page
from megatron_bliss.report.result import demo_result

VOCAB_SIZE = 2048
SEQUENCE_LENGTH = 128  # tokens
NUM_CORES = 2  # the demo is planned for two cores, and gives the same numbers on any machine
ROUNDS = 2
ROUND_STEPS = 150  # of the LLM
RANDOM_FACTOR = 3.0  # the random arm goes on this much longer, so that the speed-up is read off a real curve

_CONTROLS = {
    "random": settings.ControlConfig(name="random", method="random", steps_factor=RANDOM_FACTOR),
    "high_loss": settings.ControlConfig(name="high_loss", method="perplexity", settings={"perplexity.keep": "high"}),
}
ARMS = ("bliss", *_CONTROLS)
_CLAIM = "demo.json"  # which experiment a directory is for


@dataclass(frozen=True)
class Experiment:
    """What `megatron-bliss demo` was asked for; None means the built-in corpus."""

    pool: Path | None = None  # folder with one NAME.jsonl a domain
    validation: Path | None = None  # jsonl, upper level
    test: Path | None = None  # jsonl, looked at for the final measure only
    target_domain: str | None = None  # the pool's domain that resembles the validation set, for the AUC
    seed: int = 1
    arms: tuple[str, ...] = ARMS
    out: Path = Path("runs/demo")


def run(experiment: Experiment) -> None:
    """Prepare the corpus, run all arms, write `result.json` and `report.html`, print the tables. Called again, it does
    what is missing.

    :raises UserError: for options that do not fit together, or a directory that holds another experiment.
    """
    began = time.monotonic()
    _check(experiment)
    out, console = experiment.out, Console()
    with run_lock(out / "demo.lock"):
        seconds_before = _claim(experiment)
        texts = _texts(experiment)
        corpus = experiment_corpus.prepare(
            texts.pool,
            texts.validation,
            texts.test,
            out / "corpus",
            vocab_size=VOCAB_SIZE,
            cut=SEQUENCE_LENGTH,
            seed=experiment.seed,
            num_workers=NUM_CORES,
            is_in_use=RunPaths(out).config.exists(),
        )
        if texts.target_domain not in (None, *corpus.pool):
            raise UserError(f"--target-domain is {texts.target_domain!r}; the pool has {', '.join(corpus.pool)}")
        local.run(experiment_config(experiment, corpus), out)
        seconds = seconds_before + time.monotonic() - began
        write_json(out / _CLAIM, _claimed(experiment) | {"wall_s": seconds})
        result = demo_result(out, seed=experiment.seed, target_domain=texts.target_domain, wall_s=seconds)
        write_json(out / "result.json", result)
        page.write(out)
    for table in (result_table(result), domain_table(result)):
        console.print(table)
    print(f"{out / 'report.html'} shows the curves and what was kept.")
    print(f"{out / 'result.json'} has the numbers. It took {seconds / 60:.1f} minutes.")


@dataclass(frozen=True)
class _Texts:
    pool: Path
    validation: Path
    test: Path
    target_domain: str | None


def _check(experiment: Experiment) -> None:
    given = [experiment.pool, experiment.validation, experiment.test]
    if any(given) and not all(given):
        raise UserError(
            "--pool, --validation and --test belong together: give all three, or none for the built-in text"
        )
    arms = experiment.arms
    if set(arms) - set(ARMS) or not {"bliss", "random"} <= set(arms) or len(set(arms)) < len(arms):
        raise UserError(f"--arms is {','.join(arms)}; name bliss and random, each once, and if wanted {ARMS[2]}")


def _claimed(experiment: Experiment) -> dict[str, Any]:
    """What makes two calls the same experiment."""
    sources = [experiment.pool, experiment.validation, experiment.test]
    return {
        "schema": 1,
        "seed": experiment.seed,
        "arms": list(experiment.arms),
        "texts": [str(path.resolve()) if path else "built-in" for path in sources],
    }


def _claim(experiment: Experiment) -> float:
    """Note which experiment the directory is for; returns the seconds that earlier calls of it took.

    :raises UserError: if it is another one's: nothing of that may be overwritten.
    """
    path, ours = experiment.out / _CLAIM, _claimed(experiment)
    known = read_json(path) if path.exists() else ours | {"wall_s": 0.0}
    changed = [f"{key} {known[key]} -> {value}" for key, value in ours.items() if known[key] != value]
    if changed:
        raise UserError(
            f"{experiment.out} holds another experiment ({'; '.join(changed)}); give a directory of its own with --out"
        )
    write_json(path, known)
    return float(known["wall_s"])


def _texts(experiment: Experiment) -> _Texts:
    if experiment.pool and experiment.validation and experiment.test:
        return _Texts(experiment.pool, experiment.validation, experiment.test, experiment.target_domain)
    texts = experiment.out / "corpus" / "text"
    demo_corpus.build(texts, seed=experiment.seed)
    target = experiment.target_domain or demo_corpus.TARGET_DOMAIN
    return _Texts(texts / "pool", texts / "validation.jsonl", texts / "test.jsonl", target)


def experiment_config(experiment: Experiment, corpus: experiment_corpus.Prepared) -> settings.RunConfig:
    """The run's settings: a target of 1.1 M parameters, a proxy of 0.24 M, minutes instead of weeks."""
    return settings.RunConfig(
        seed=experiment.seed,
        method="bliss",
        rounds=ROUNDS,
        round_steps=ROUND_STEPS,
        data=settings.DataConfig(
            pool=[settings.DomainConfig(name, [prefix]) for name, prefix in corpus.pool.items()],
            validation=corpus.validation,
            test=corpus.test,
            tokenizer=settings.TokenizerConfig(model=corpus.tokenizer, vocab_size=corpus.vocab_size),
            sequence_length=SEQUENCE_LENGTH,
            held_out=28,
        ),
        target=settings.TargetConfig(
            model=settings.ModelConfig(preset="small"),
            global_batch_size=16,
            micro_batch_size=16,
            lr=2e-3,
            min_lr=2e-5,
            lr_warmup_steps=40,
            save_interval=75,
        ),
        proxy=settings.ProxyConfig(model=settings.ModelConfig(preset="tiny")),
        warmup=settings.WarmupConfig(
            fraction=0.25, target_steps=300, proxy_steps=200, proxy_batch_size=32, proxy_lr=3e-3
        ),
        bilevel=settings.BilevelConfig(
            outer_steps=60, micro_batch_size=32, lr_proxy=1e-3, lr_score=1e-3, checkpoint_interval=20,
            # what the README's figures were made with: sixty steps are too few for an average over a hundred
            curvature="finite-difference", gradient_average=0.9, solve_interval=1,
        ),
        scoring=settings.ScoringConfig(batch_tokens=4096, chunk_sequences=4096),
        evaluation=settings.EvaluationConfig(decay_steps=24, max_sequences=160, curve=True),
        launch=settings.LaunchConfig(concurrency=NUM_CORES, threads=1),
        controls=[_CONTROLS[arm] for arm in experiment.arms if arm in _CONTROLS],
    )  # fmt: skip


def result_table(result: dict[str, Any]) -> Table:
    """The table the demo ends with: one line an arm."""
    title = f"Seed {result['seed']}: every arm after {result['iteration']} steps"
    table = Table("arm", "test loss", "tokens", "selection FLOPs", "training FLOPs", title=title)
    for name, arm in result["arms"].items():
        flops = (_number(arm[kind], ".1e") for kind in ("selection_flops", "train_flops"))
        table.add_row(name, _number(arm["test_loss"], ".3f"), f"{arm['tokens'] / 1e6:.2f} M", *flops)
    captions = []
    if result["speedup_over_random"] is not None:
        bound = "more than " if result["speedup_is_lower_bound"] else ""
        captions.append(
            f"random needs {bound}{result['speedup_over_random']:.1f} times the steps of BLISS for its loss"
        )
    if result["auc_target_domain"] is not None:
        captions.append(f"AUC of the target domain {result['auc_target_domain']:.2f}")
    table.caption = "; ".join(captions)
    return table


def _number(value: float | None, style: str) -> str:
    return "–" if value is None else format(value, style)


def domain_table(result: dict[str, Any]) -> Table:
    """Loss on every domain's held-out sequences: what an arm does not select, it does not learn."""
    arms = result["arms"]
    table = Table("domain", *(Column(name, justify="right") for name in arms), title="Loss by domain")
    for domain in sorted(next(iter(arms.values()))["domain_loss"]):
        losses = [arm["domain_loss"][domain] for arm in arms.values()]
        table.add_row(domain, *(_number(loss, ".2f") for loss in losses))
    return table
