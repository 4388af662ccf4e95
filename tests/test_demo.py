"""The demo's options and tables; the experiment itself is what `make demo` runs."""

from pathlib import Path

import pytest
from rich.console import Console

from megatron_bliss import demo
from megatron_bliss.data import experiment_corpus
from megatron_bliss.data.shards import Shard
from megatron_bliss.errors import UserError
from tests.small_text import documents, write_jsonl


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pool": Path("texts")}, "belong together"),
        ({"arms": ("bliss",)}, "name bliss and random"),
        ({"arms": ("bliss", "random", "random")}, "each once"),
        ({"arms": ("bliss", "random", "best")}, "--arms is bliss,random,best"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        demo.run(demo.Experiment(out=tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_a_directory_of_another_seed_is_left_alone(tmp_path: Path) -> None:
    demo._claim(demo.Experiment(seed=1, out=tmp_path))
    assert demo._claim(demo.Experiment(seed=1, out=tmp_path)) == 0
    before = (tmp_path / "demo.json").read_bytes()
    with pytest.raises(UserError, match=r"holds another experiment \(seed 1 -> 2\)"):
        demo.run(demo.Experiment(seed=2, out=tmp_path))
    assert (tmp_path / "demo.json").read_bytes() == before
    assert not (tmp_path / "corpus").exists()


def write_texts(folder: Path, num_documents: int) -> tuple[Path, Path, Path]:
    for seed, name in enumerate(("good", "other")):
        write_jsonl(folder / "pool" / f"{name}.jsonl", documents(num_documents, seed + 1))
    held_out = [
        write_jsonl(folder / f"{name}.jsonl", documents(20, seed)) for seed, name in ((8, "valid"), (9, "test"))
    ]
    return folder / "pool", *held_out


def test_a_target_domain_that_the_pool_has_not_is_refused_before_any_training(tmp_path: Path) -> None:
    pool, valid, test = write_texts(tmp_path, 400)
    with pytest.raises(UserError, match="--target-domain is 'nope'; the pool has good, other"):
        demo.run(demo.Experiment(pool, valid, test, "nope", out=tmp_path / "out"))
    assert not (tmp_path / "out" / "run.yaml").exists()


def test_text_that_a_run_was_started_on_is_not_replaced(tmp_path: Path) -> None:
    pool, valid, test = write_texts(tmp_path, 400)
    settings = {"vocab_size": 512, "cut": 32, "seed": 1}
    prepared = experiment_corpus.prepare(pool, valid, test, tmp_path / "out", **settings)
    again = experiment_corpus.prepare(pool, valid, test, tmp_path / "out", **settings, is_in_use=True)
    assert again == prepared
    write_jsonl(pool / "other.jsonl", documents(410, 7))
    before = Path(f"{prepared.pool['other']}.bin").read_bytes()
    with pytest.raises(UserError, match="was made of other text than there is now"):
        experiment_corpus.prepare(pool, valid, test, tmp_path / "out", **settings, is_in_use=True)
    assert Path(f"{prepared.pool['other']}.bin").read_bytes() == before


def test_large_pools_are_thinned_out_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pool, valid, test = write_texts(tmp_path, 800)
    settings = {"vocab_size": 512, "cut": 32, "seed": 1}
    whole = experiment_corpus.prepare(pool, valid, test, tmp_path / "whole", **settings)
    size = sum(path.stat().st_size for path in pool.glob("*.jsonl"))
    monkeypatch.setattr(experiment_corpus, "POOL_BYTES", size // 2)
    half = experiment_corpus.prepare(pool, valid, test, tmp_path / "half", **settings)
    assert "a random 50.0% of its documents is used" in capsys.readouterr().out
    for name in ("good", "other"):
        share = len(Shard(half.pool[name])) / len(Shard(whole.pool[name]))
        assert 0.4 < share < 0.6


def test_little_text_gets_a_smaller_vocabulary_and_hardly_any_a_sentence(tmp_path: Path) -> None:
    pool, valid, test = write_texts(tmp_path, 60)
    prepared = experiment_corpus.prepare(pool, valid, test, tmp_path / "out", vocab_size=8192, cut=32, seed=1)
    assert 512 <= prepared.vocab_size < 8192
    for path in pool.glob("*.jsonl"):
        write_jsonl(path, ["a b c"])
    with pytest.raises(UserError, match="too little for a tokenizer"):
        experiment_corpus.prepare(pool, valid, test, tmp_path / "tiny", vocab_size=8192, cut=32, seed=1)


def arm(test_loss: float | None, flops: float | None) -> dict:
    return {
        "test_loss": test_loss,
        "domain_loss": {"docs": test_loss},
        "tokens": 1e6,
        "selection_flops": flops,
        "train_flops": 1e12,
    }


RESULT = {
    "seed": 1,
    "iteration": 640,
    "speedup_over_random": 3.0,
    "speedup_is_lower_bound": True,
    "auc_target_domain": None,
    "arms": {"bliss": arm(4.2, None), "random": arm(None, 0.0)},
}


def test_tables_show_what_there_is() -> None:
    console = Console(width=80, record=True)
    for table in (demo.result_table(RESULT), demo.domain_table(RESULT)):
        console.print(table)
    shown = console.export_text()
    assert "more than 3.0 times" in shown
    assert "4.200" in shown
    assert "–" in shown
    assert "AUC" not in shown
