"""Each warning on what deserves it, silence on what does not; and the search for validation text in the pool."""

import copy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bliss.artifacts import read_json
from megatron_bliss.config import GuardsConfig
from megatron_bliss.data import contamination
from megatron_bliss.data.shards import Shard, ShardWriter
from megatron_bliss.data.validation import ValidationSet
from megatron_bliss.report.warnings import WARNINGS, warnings
from megatron_bliss.stages import inventory
from tests.tiny_run import tiny_config

HEALTHY: dict[str, Any] = {
    "main_arm": "bliss",
    "guards": asdict(GuardsConfig()),
    "result": {
        "arms": {
            "bliss": {"method": "bliss", "test_loss": 3.0},
            "random": {"method": "random", "test_loss": 3.4},
            "low": {"method": "perplexity", "test_loss": 2.9},
        }
    },
    "arms": {
        "bliss": {
            "decays": [{"round": 1, "validation_loss": 3.3}, {"round": 2, "validation_loss": 3.35}],
            "fidelity": [
                {
                    "round": number,
                    "sequences": 500,
                    "correlations": {
                        "scores_target": {"spearman": 0.05, "low": -0.04, "high": 0.14},  # may well be 0.1 or more
                        "proxy_target": {"spearman": 0.3, "low": 0.21, "high": 0.38},
                    },
                }
                for number in (1, 2)
            ],
        }
    },
    "rounds": [
        {
            "round": number,
            "selection": {
                "score_distribution": {"percentiles": np.linspace(-1, 1, 101).tolist()},
                "domains": [
                    {"domain": "docs", "kept_share": 0.75, "candidates_share": 0.1},
                    {"domain": "code", "kept_share": 0.25, "candidates_share": 0.9},
                ],
            },
            "bilevel": {"step": list(range(50)), "kl": [0.5 + 0.005 * step for step in range(50)]},
        }
        for number in (1, 2)
    ],
    "validation_sets": {
        "docs": {
            "num_sequences": 600, "found": 6, "contaminated_share": 0.01, "read_tokens": 9_000, "pool_tokens": 9_000
        }
    },
}  # fmt: skip


def selection(facts: dict[str, Any]) -> dict[str, Any]:
    return facts["rounds"][1]["selection"]


def deserve_constant(facts: dict[str, Any]) -> None:
    selection(facts)["score_distribution"]["percentiles"] = [0.0, *[0.3] * 99, 1.0]


def deserve_domain(facts: dict[str, Any]) -> None:
    selection(facts)["domains"][0]["kept_share"] = 0.93


def deserve_unfaithful(facts: dict[str, Any]) -> None:
    found = facts["arms"]["bliss"]["fidelity"][1]["correlations"]
    found["scores_target"] = {"spearman": -0.01, "low": -0.1, "high": 0.08}


def deserve_kl(facts: dict[str, Any]) -> None:
    facts["rounds"][1]["bilevel"]["kl"][-5:] = [1.2] * 5


def deserve_kl_without_a_number(facts: dict[str, Any]) -> None:
    facts["rounds"][1]["bilevel"]["kl"][-1] = None


def deserve_random(facts: dict[str, Any]) -> None:
    facts["result"]["arms"]["random"]["test_loss"] = 3.004


def deserve_loss(facts: dict[str, Any]) -> None:
    facts["arms"]["bliss"]["decays"][1]["validation_loss"] = 3.41


def deserve_small(facts: dict[str, Any]) -> None:
    facts["validation_sets"]["docs"]["num_sequences"] = 120


def deserve_contaminated(facts: dict[str, Any]) -> None:
    facts["validation_sets"]["docs"] |= {"found": 90, "contaminated_share": 0.3, "read_tokens": 4_500}


@pytest.mark.parametrize(
    ("deserve", "name", "number", "words"),
    [
        (deserve_constant, "constant scores", 2, "percentile are 0 apart (guards.score_spread=0.001)"),
        (deserve_domain, "one domain", 2, "docs is 93% of what was kept in round 2, and 10% of what was offered"),
        (
            deserve_unfaithful,
            "unfaithful scores",
            2,
            "is -0.01 (-0.10 to 0.08) over 500 sequences, below guards.fidelity=0.1",
        ),
        (deserve_kl, "diverging KL", 2, "their KL grew from 0.51 to 1.2 (guards.kl_growth=2)"),
        (deserve_kl_without_a_number, "diverging KL", 2, "their KL is no longer a number"),
        (deserve_random, "no better than random", None, "its loss is 3.000, that of random 3.004"),
        (deserve_loss, "rising loss", 2, "from 3.300 to 3.410 (guards.loss_increase=0.1)"),
        (deserve_small, "small validation set", None, "The set docs has 120 sequences"),
        (deserve_contaminated, "contaminated validation set", None, "About 30% of the set docs"),
    ],
)
def test_each_warning_fires_on_what_deserves_it(
    deserve: Callable[[dict[str, Any]], None], name: str, number: int | None, words: str
) -> None:
    facts = copy.deepcopy(HEALTHY)
    deserve(facts)
    [warning] = warnings(facts)
    assert (warning["name"], warning["round"]) == (name, number)
    assert words in warning["sentence"]


def test_a_healthy_run_has_no_warning_nor_has_one_that_has_only_begun() -> None:
    assert warnings(HEALTHY) == []
    empty = [{"round": 1, "selection": None, "bilevel": None}]
    begun = HEALTHY | {
        "result": None,
        "rounds": empty,
        "validation_sets": {},
        "arms": {"bliss": {"decays": [], "fidelity": []}},
    }
    assert warnings(begun) == []
    assert warnings(HEALTHY | {"rounds": [empty[0] | {"selection": {"note": "scores are gone"}}]}) == []
    constant = copy.deepcopy(HEALTHY)
    unknown = {"spearman": None, "low": None, "high": None}
    constant["arms"]["bliss"]["fidelity"][0]["correlations"]["scores_target"] = unknown
    assert warnings(constant) == []


def test_every_warning_is_tried_above() -> None:
    assert len(WARNINGS) == 8


# --- validation text in the pool


def write(prefix: Path, sequences: list[np.ndarray]) -> str:
    with ShardWriter(prefix, np.uint16) as writer:
        for sequence in sequences:
            writer.add_document([sequence])
    return str(prefix)


def test_sequences_are_found_by_most_of_their_n_grams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    texts = [random.integers(0, 60_000, 40).astype(np.uint16) for _ in range(5)]
    texts.append(random.integers(0, 60_000, 12).astype(np.uint16))  # too short for any
    noise = [random.integers(0, 60_000, 100).astype(np.uint16) for _ in range(300)]
    half = np.concatenate([texts[1][:25], noise[0]])  # 13 of its 28 n-grams: not most of them
    more = np.concatenate([noise[1], texts[2][:27]])  # 15 of 28
    pool = [Shard(write(tmp_path / "a", [*noise[:100], texts[0], half])), Shard(write(tmp_path / "b", [more, *noise]))]
    found = contamination.contamination(pool, ValidationSet.open(write(tmp_path / "v", texts)), 1_000_000)
    tokens = sum(part.num_tokens for part in pool)
    assert found == {"num_sequences": 6, "with_grams": 5, "found": 2, "read_tokens": tokens, "pool_tokens": tokens}
    monkeypatch.setattr(contamination, "_BLOCK", 1000)
    part = contamination.contamination(pool, ValidationSet.open(tmp_path / "v"), 5_000)
    assert 4_000 <= part["read_tokens"] <= 6_000


def test_the_same_tokens_have_the_same_hash_and_others_another() -> None:
    tokens = np.arange(20, dtype=np.uint16)
    hashes = contamination.gram_hashes(tokens)
    assert len(hashes) == len(set(hashes.tolist())) == 8
    assert contamination.gram_hashes(np.arange(3, 20).astype(np.int32)).tolist() == hashes[3:].tolist()
    assert len(contamination.gram_hashes(tokens[:12])) == 0
    assert contamination.gram_hashes(tokens[::-1])[-1] != hashes[0]


def test_the_inventory_says_what_it_found_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "run.yaml").write_text(config.read_text())
    inventory.run(run_dir)
    said = capsys.readouterr().out
    written = read_json(run_dir / "contamination.json")
    # walks over the vocabulary, which stand in the pool's walks: a set that gives nothing to learn
    assert written["sets"]["validation"]["found"] > 10
    assert f"{written['sets']['validation']['found']} of 64 sequences of the set validation" in said
    inventory.run(run_dir)
    assert "of the set validation" not in capsys.readouterr().out
