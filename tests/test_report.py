"""Report and result from synthetic files of a run, and the pure functions under them."""

import json
import re
import shutil
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bliss.artifacts import RunPaths, read_json, write_json
from megatron_bliss.config import RunConfig, read_saved_config, save_config
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.scores import ScoreWriter
from megatron_bliss.data.selection import Counts, KeptShard, write_selection
from megatron_bliss.data.slices import Slicing
from megatron_bliss.errors import UserError
from megatron_bliss.orchestration.cost import (
    Cost,
    PoolSize,
    arm_costs,
    quantity,
    selection_flops,
    train_flops,
)
from megatron_bliss.orchestration.flops import bilevel_flops_per_step
from megatron_bliss.orchestration.plan import arms
from megatron_bliss.orchestration.state import prepare
from megatron_bliss.report import page, result
from megatron_bliss.report.collect import collect
from megatron_bliss.report.curves import columns
from megatron_bliss.report.facts import report_facts
from megatron_bliss.report.rounds import distance, rank_correlation, readable
from megatron_bliss.report.speedup import Speedup, auc, iteration_of_loss, speedup
from megatron_bliss.report.summary import summary
from megatron_bliss.stages.inventory import collect as take_inventory
from tests import report_page
from tests.tiny_run import tiny_config

DOMAINS = ("walk", "noise")


# --- speed-up and AUC


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(4.0, 100.0), (3.5, 150.0), (2.0, 400.0), (1.9, None), (5.0, 100.0)],
)
def test_iteration_of_a_loss(loss: float, expected: float | None) -> None:
    curve = [(100, 4.0), (200, 3.0), (300, 3.2), (400, 2.0)]  # the bump at 300 is not progress
    assert iteration_of_loss(curve, loss) == expected


def test_speedup_counts_from_the_end_of_the_warmup() -> None:
    curve = [(500, 3.0), (600, 2.0)]
    assert speedup(curve, 2.5, reached_at=450, start=400) == Speedup(pytest.approx(150 / 50), lower_bound=False)
    assert speedup(curve, 1.0, reached_at=450, start=400) == Speedup(pytest.approx(200 / 50), lower_bound=True)


@given(st.lists(st.floats(1, 5), min_size=2, max_size=20), st.floats(1, 5), st.floats(0, 1))
def test_a_lower_loss_is_never_reached_sooner(losses: list[float], loss: float, drop: float) -> None:
    curve = [(100 * (place + 1), value) for place, value in enumerate(losses)]
    early, late = iteration_of_loss(curve, loss), iteration_of_loss(curve, loss - drop)
    assert late is None or (early is not None and early <= late)
    assert (early is None) == (min(losses) > loss)
    if early is not None:
        assert curve[0][0] <= early <= curve[-1][0]


@given(
    st.lists(st.integers(-5, 5), min_size=1, max_size=12),
    st.lists(st.integers(-5, 5), min_size=1, max_size=12),
)
def test_auc_is_the_share_of_won_pairs(positive: list[int], negative: list[int]) -> None:
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    found = auc(np.array(positive, np.float32), np.array(negative, np.float32))
    assert found == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


# --- a run made of files


def losses(value: float) -> dict[str, Any]:
    return {
        "validation_loss": value + 0.1,
        "test_loss": value,
        "domain_loss": {"walk": value - 1, "noise": value + 1},
    }


def write_results(paths: RunPaths, number: int, first: int, last: int, loss_at: Any) -> None:
    curve = [{"iteration": i, "tokens": 128 * i, **losses(loss_at(i))} for i in range(first + 3, last + 1, 3)]
    decay = losses(loss_at(last) - 0.25)
    content = {"schema": 1, "iteration": last, "tokens_trained": 128 * last, "decay": decay, "curve": curve}
    write_json(paths.evaluation(number) / "results.json", content)


def write_scores(paths: RunPaths, inventory: Inventory, wanted: dict[int, dict[str, np.ndarray]]) -> None:
    """Sequences of `walk` score 1 or 2, those of `noise` 0 or 1: three quarters of the pairs won, the rest tied."""
    for number, ids in wanted.items():
        writer = ScoreWriter(
            paths.scores(number), inventory.pool, ids, method="bliss", model_digest="", seed=7, chunk_sequences=10_000
        )
        for chunk in writer.pending():
            base = 1 if chunk.record.domain == "walk" else 0
            writer.write(chunk, (base + np.arange(len(chunk.ids)) % 2).astype(np.float32))


def write_selections(
    paths: RunPaths, inventory: Inventory, kept_tokens: dict[str, int], wanted: dict[int, dict[str, np.ndarray]]
) -> None:
    for number in (1, 2):
        shards = [
            KeptShard(
                record, wanted[number][record.name][1:10:2], Counts(5, kept_tokens[record.domain], 200, 1000), 0.5
            )
            for record in inventory.pool
        ]
        write_selection(
            paths.selection(number),
            shards,
            method="bliss",
            seed=7,
            fraction=0.2,
            thresholds=dict.fromkeys(DOMAINS, 1.0),
            blend_policy="pool",
            sources={},
        )


@pytest.fixture
def run(tmp_path: Path, made: Path) -> Path:
    """A copy of `made` to change."""
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of 6 steps after a warm-up of 6; a random control of twice the steps that ends at the same loss."""
    tmp_path = tmp_path_factory.mktemp("made")
    config: RunConfig = read_saved_config(tiny_config(tmp_path))
    run_dir = tmp_path / "run"
    prepare(config, run_dir)
    inventory = take_inventory(config)
    main, random = arms(config, run_dir)
    inventory.write(main.paths.inventory)
    for number in (1, 2):
        ends = main.config.round_end(number - 1), main.config.round_end(number)
        write_results(main.paths, number, *ends, lambda i: 5 - 0.1 * (i - 6))
        write_results(
            random.paths,
            number,
            random.config.round_end(number - 1),
            random.config.round_end(number),
            lambda i: 5 - 0.05 * (i - 6),
        )
        metrics = main.paths.bilevel(number) / "metrics.jsonl"
        metrics.parent.mkdir(parents=True)
        metrics.write_text(
            "".join(json.dumps({"step": s, "kl": 1 / s, "z_norm": s, "note": "x"}) + "\n" for s in range(1, 9))
        )
        training = main.paths.training_metrics(number)
        training.parent.mkdir(parents=True)
        training.write_text(
            "".join(json.dumps({"step": s, "loss": 5.0, "loss/walk": 5.0}) + "\n" for s in range(*ends))
        )
    slicing = Slicing.of(config, inventory)
    wanted = {number: {record.name: slicing.ids(record, number) for record in inventory.pool} for number in (1, 2)}
    write_selections(main.paths, inventory, {"walk": 300, "noise": 100}, wanted)
    write_selections(random.paths, inventory, {"walk": 200, "noise": 200}, wanted)
    write_scores(main.paths, inventory, wanted)
    correlation = {"spearman": 0.44, "low": 0.37, "high": None}
    pairs = dict.fromkeys(("scores_target", "proxy_target", "scores_proxy"), correlation)
    found = {"schema": 1, "iteration": 6, "sequences": 500, "correlations": pairs}
    write_json(main.paths.fidelity(1) / "results.json", found)
    tasks = {"sciq": {"acc": 0.625, "acc_stderr": 0.031, "documents": 400}}
    write_json(main.paths.evaluation(1) / "benchmarks.json", {"schema": 1, "tasks": tasks})
    usage = [{"schema": 1, "seconds": 1800.0, "ranks": 2, "peak_host_bytes": size} for size in (5_000_000, 7_000_000)]
    main.paths.usage("bilevel", 1).parent.mkdir()
    main.paths.usage("bilevel", 1).write_text("".join(f"{json.dumps(line)}\n" for line in usage))
    return run_dir


def test_result_compares_like_with_like_at_the_common_step(run: Path) -> None:
    found = result.demo_result(run, seed=3, target_domain="walk", wall_s=12.5)
    assert (found["schema"], found["seed"], found["wall_s"], found["iteration"]) == (1, 3, 12.5, 18)
    bliss, random = found["arms"]["bliss"], found["arms"]["random"]
    # random's decay branches leave at 18 and 30, the main arm's at 12 and 18
    assert found["measure"] == "after decay"
    assert bliss["test_loss"] == pytest.approx(5 - 1.2 - 0.25)
    assert random["test_loss"] == pytest.approx(5 - 0.6 - 0.25)
    assert random["domain_loss"] == {"walk": pytest.approx(3.15), "noise": pytest.approx(5.15)}
    assert bliss["tokens"] == random["tokens"] == 18 * 4 * 32
    assert bliss["train_flops"] == random["train_flops"]
    assert bliss["selection_flops"] > random["selection_flops"] == 0
    assert found["speedup_over_random"] == pytest.approx(2.0)  # undecayed: 3.8 at 18 and at 30
    assert found["speedup_is_lower_bound"] is False
    assert found["auc_target_domain"] == pytest.approx(7 / 8, abs=0.01)


def test_result_falls_back_to_the_main_line_for_every_arm(run: Path) -> None:
    (run / "controls/random/round-0001/evaluation/results.json").unlink()
    path = run / "controls/random/round-0002/evaluation/results.json"
    content = read_json(path)
    content["curve"] = [point | {"iteration": point["iteration"] - 7} for point in content["curve"]]  # 14, 17, 20, 23
    write_json(path, content)
    found = result.demo_result(run)
    assert found["measure"] == "before decay"
    assert found["arms"]["bliss"]["test_loss"] == pytest.approx(3.8)
    assert found["arms"]["random"]["test_loss"] == pytest.approx(4.1 - 0.15 / 3)  # a third of the way from 17 to 20
    assert found["seed"] == 7


def test_a_run_of_one_arm_says_what_it_cannot_tell(run: Path) -> None:
    sentence = "There is one arm, so this cannot say what selecting is worth"
    for controls in (read_saved_config(run / "run.yaml").controls, []):
        save_config(replace(read_saved_config(run / "run.yaml"), controls=controls), run / "run.yaml")
        result.write(run)
        page.write(run)
        assert (sentence in (run / "report.html").read_text()) == (not controls)


def test_a_target_domain_that_is_not_there_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match="'prose' is not in the pool; it has walk, noise"):
        result.demo_result(run, target_domain="prose")


def test_every_number_on_the_page_is_the_one_in_the_json(run: Path) -> None:
    write_json(run / "result.json", result.demo_result(run, target_domain="walk", wall_s=3723))
    result.write(run)
    page.write(run)
    found, html = read_json(run / "report.json"), (run / "report.html").read_text()
    assert found["result"] == read_json(run / "result.json")
    assert found["result"]["target_domain"] == "walk"
    read = report_page.read(html)
    assert len(read.numbers) > 150
    for keys, exact, text in read.numbers:
        value = reduce(lambda part, key: part[key], keys, found)
        assert exact == value, keys
        is_shown = pytest.approx(value, rel=6e-3, abs=6e-4) if value is not None else None
        assert report_page.number(text) == is_shown, (keys, text)
    known = report_page.strings(found)
    assert set(read.words) <= known
    assert "Random data needed 2.0 times the steps of bliss since the warm-up to reach that loss." in read.words
    assert not [text for text in read.rest if re.search(r"\d", text)], "a number that is not from the JSON"
    shown = {tuple(keys): text for keys, _, text in read.numbers}
    assert shown["result", "arms", "bliss", "test_loss"] == "3.5500"
    assert shown["arms", "random", "decays", 0, "domain_loss", "noise"] == f"{5 - 0.6 - 0.25 + 1:.4f}"
    assert shown["arms", "bliss", "benchmarks", 0, "tasks", "sciq", "acc"] == "62.5%"
    assert shown["wall_s",] == "1:02:03"
    measured = ("arms", "bliss", "fidelity", 0, "correlations", "scores_target")
    assert [shown[*measured, key] for key in ("spearman", "low", "high")] == ["0.44", "0.37", "–"]
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//|<script|@import""", html)
    pictures = [attributes for tag, attributes in read.tags if tag == "svg"]
    assert len(pictures) >= 8
    assert all(attributes.get("role") == "img" and attributes["aria-label"] for attributes in pictures)


def test_the_report_tells_what_was_chosen_and_how_it_moved(run: Path) -> None:
    facts = report_facts(run, None)
    first, second = (entry["selection"] for entry in facts["rounds"])
    assert first["drift"] is first["previous"] is None
    assert second["drift"] == {"distance": pytest.approx(0, abs=0.06), "rank_correlation": None}
    assert second["previous"]["disjoint_slices"]
    found = second["score_distribution"]
    assert (found["mean"], found["percentiles"][0], found["percentiles"][100]) == (pytest.approx(1, abs=0.05), 0, 2)
    assert sum(found["candidates"]) == second["sizes"]["candidates"]["sequences"]
    assert sum(found["kept"]) == 10
    assert {sample["kept"] for sample in second["samples"]["best"]} == {True}
    [kept] = [entry for entry in facts["arms"]["bliss"]["kept"] if entry["round"] == 2]
    assert kept["kept_share"] == {"walk": 0.75, "noise": 0.25}
    assert kept["offered_share"] == {"walk": 0.5, "noise": 0.5}
    assert facts["ends"] == [6, 12, 18]
    assert facts["rounds"][0]["training"]["loss/walk"] == [5.0] * 6


def test_scores_that_moved_are_seen(run: Path) -> None:
    """With one pool for all rounds; the scores of the second round are those of the first one, upside down."""
    inventory = Inventory.read(run / "inventory.json")
    for path in (run / "round-0002/scores").glob("*.npy"):
        np.save(path, 10 - np.load(run / "round-0001/scores" / path.name))
    found = rank_correlation(run / "round-0001/scores", run / "round-0002/scores", inventory.pool)
    assert found == pytest.approx(-1)
    assert distance(list(range(101)), list(range(50, 151))) == pytest.approx(0.5, abs=0.01)
    assert distance([1.0] * 101, [1.0] * 101) == 0
    assert distance([1.0] * 101, [2.0] * 101) == 1


def test_the_ledger_keeps_the_parts_of_the_work_apart(run: Path) -> None:
    ledgers = report_facts(run, None)["ledger"]
    rows = {row["part"]: row for row in ledgers["bliss"]}
    loop = rows["selection: bilevel loop"]
    assert (loop["device_hours"], loop["peak_host_bytes"], loop["peak_device_bytes"]) == (2.0, 7_000_000, None)
    assert loop["disk_bytes"] == sum(p.stat().st_size for p in run.glob("round-*/bilevel/*"))
    config = read_saved_config(run / "run.yaml")
    assert loop["flops"] == pytest.approx(2 * 8 * bilevel_flops_per_step(config))
    assert rows["LLM: rounds"]["flops"] + rows["LLM: warm-up"]["flops"] == pytest.approx(train_flops(config, 18))
    assert rows["LLM: rounds"]["device_hours"] is None
    assert rows["selection: choosing"]["tokens"] == 0
    assert {"proxy: warm-up", "selection: scoring", "LLM: evaluation"} < rows.keys()
    assert [row["part"] for row in ledgers["random"] if row["part"].startswith(("proxy", "reference"))] == []


def test_text_is_escaped_cut_and_printable(run: Path) -> None:
    facts = report_facts(run, None)
    sample = facts["rounds"][1]["selection"]["samples"]["best"][0]
    sample["text"] = readable("<script>alert(1)</script>\x00\x1b" + "x" * 5000)
    html = page.html(facts)
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;��x" in html
    assert sample["text"].endswith("x …")
    assert len(sample["text"]) < 1000


def test_long_curves_are_means_of_a_few_hundred_points() -> None:
    lines = [{"step": step, "a": float(step), **({"b": 1.0} if step > 500 else {})} for step in range(1, 1001)]
    found = columns(lines, limit=100)
    assert found["step"] == list(range(10, 1001, 10))
    assert found["a"][:2] == [5.5, 15.5]
    assert (found["b"][0], found["b"][-1]) == (None, 1.0)
    assert columns(lines[:7])["a"] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


def test_the_page_of_a_run_that_is_not_done(run: Path) -> None:
    for path in [
        *run.glob("round-*/bilevel/*"),
        *run.glob("controls/*/round-*/evaluation/*"),
        *run.glob("round-0002/*/*.json"),
    ]:
        path.unlink()
    result.write(run)
    page.write(run)
    assert "<svg" in (run / "report.html").read_text()


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    prepare(read_saved_config(tiny_config(tmp_path)), tmp_path / "run")
    result.write(tmp_path / "run")
    page.write(tmp_path / "run")
    assert not (tmp_path / "run/result.json").exists()
    assert "Nothing has been evaluated yet." in (tmp_path / "run/report.html").read_text()
    with pytest.raises(UserError, match="no evaluation yet"):
        result.demo_result(tmp_path / "run")
    with pytest.raises(UserError, match=r"run\.yaml does not exist"):
        page.write(tmp_path)


def test_kept_shares_come_from_the_manifests(run: Path) -> None:
    files = collect(run)
    main, random = files.arms
    assert main.rounds[1].kept["walk"].kept_tokens == 300
    assert random.rounds[0].kept == {domain: Counts(5, 200, 200, 1000) for domain in DOMAINS}
    assert [set(line) for line in main.rounds[0].bilevel] == [{"step", "kl", "z_norm"}] * 8


def described(**changes: Any) -> dict[str, Any]:
    arm = {"method": "bliss", "test_loss": 3.0, "selection_flops": 1e9, "train_flops": 4e9}
    random = {"method": "random", "test_loss": 3.5, "selection_flops": 0.0, "train_flops": 4e9}
    return {
        "main_arm": "bliss",
        "iteration": 10,
        "measure": "after decay",
        "arms": {"bliss": arm, "random": random},
        "speedup_over_random": 3.0,
        "speedup_is_lower_bound": True,
        "auc_target_domain": None,
    } | changes


def test_the_summary_is_plain_about_success_and_failure() -> None:
    good = " ".join(summary(described()))
    assert "random is at 3.500, which is 0.500 worse" in good
    assert "had not reached that loss after 3.0 times the steps" in good
    assert "Selecting took 25%" in good
    bad = described(speedup_over_random=0.8, speedup_is_lower_bound=False)
    bad["arms"]["random"]["test_loss"] = 2.9
    bad["arms"]["simple"] = {"method": "perplexity", "test_loss": 3.001}
    text = " ".join(summary(bad))
    assert "0.100 better: the selection by bliss did not help here" in text
    assert "bliss was not faster" in text
    assert "no different: a simpler rule does as well" in text


# --- cost


def test_flops_of_an_outer_step_by_hand(tmp_path: Path) -> None:
    config: RunConfig = read_saved_config(tiny_config(tmp_path))
    blocks, output, attention = 2 * (4 * 32 * 32 + 2 * 32 * 64), 256 * 32, 2 * 2 * 32 * 32
    per_token = 3 * (2 * (blocks + output) + attention)  # proxy and target alike
    batch, score_model = 8 * 32 * per_token, 8 * 32 * 4 * (2 * blocks + attention)  # which has no output layer
    # defaults: three forward and two backward passes with the target's logits once, validation, score model; the
    # proxy's logits are made once more, for its own gradient
    logits = 8 * 32 * 2 * output
    assert bilevel_flops_per_step(config) == pytest.approx(batch * (1 + 4 / 3 + 1 + 1 / 3) + score_model + logits)
    config.bilevel.curvature = "finite-difference"  # two displaced gradients
    assert bilevel_flops_per_step(config) == pytest.approx(batch * (2 + 1 + 1 / 3) + score_model)
    config.bilevel.gamma, config.bilevel.curvature = 0, "none"
    assert bilevel_flops_per_step(config) == pytest.approx(batch * (1 + 1 / 3 + 1) + score_model)
    config.proxy.recompute = (
        True  # a forward pass through the blocks for each backward pass: two, and the score model's
    )
    again = 8 * 32 * 3 * (2 * blocks + attention)
    assert bilevel_flops_per_step(config) == pytest.approx(batch * (1 + 1 / 3 + 1) + score_model + again)


def test_costs_add_up(tmp_path: Path) -> None:
    config: RunConfig = read_saved_config(tiny_config(tmp_path))
    main, random = arms(config, tmp_path / "run")
    pool = PoolSize(1200, 30_000)
    costs = arm_costs(main, pool)
    assert costs["round-0001/score"].sequences == 400
    assert costs["round-0001/select"].tokens == 2000
    assert costs["round-0001/pretrain"].tokens == 6 * 4 * 32
    assert train_flops(config, 18) == pytest.approx(3 * (costs["round-0001/pretrain"].flops or 0))
    parts = [costs[f"round-000{n}/{stage}"].flops or 0 for n in (1, 2) for stage in ("bilevel", "score")]
    assert selection_flops(main, PoolSize(1200, 30_000)) == pytest.approx(
        sum(parts) + (costs["warmup-proxy"].flops or 0)
    )
    assert selection_flops(random, None) == 0
    assert selection_flops(main, None) is None
    assert arm_costs(main, None)["round-0001/score"] == Cost(None, None, None, None)


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (999, "999"), (1234567, "1.23M"), (7.4e9, "7.4G")])
def test_quantities_are_short(number: float, text: str) -> None:
    assert quantity(number) == text
