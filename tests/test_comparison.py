"""`compare`: its settings, its runs with stages that only sleep and write, its figures from synthetic files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from megatron_bliss.artifacts import RunPaths, read_json, write_json
from megatron_bliss.cli import app
from megatron_bliss.config import ControlConfig, RunConfig, load_comparison
from megatron_bliss.data.correlation import spearman
from megatron_bliss.errors import UserError
from megatron_bliss.orchestration import compare, local, state
from megatron_bliss.orchestration.plan import arms, plan
from megatron_bliss.orchestration.state import prepare
from megatron_bliss.report import collect, comparison, comparison_page, result
from megatron_bliss.report.statistics import BETTER, NO_DIFFERENCE, UNKNOWN, WORSE, Spread, spread, verdict
from megatron_bliss.stages.inventory import collect as take_inventory
from tests.fake_run import fake_command, journal
from tests.test_report import write_results, write_selections
from tests.tiny_run import megatron_bliss, tiny_config, write_chain_shard

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("compare-*.yaml"))

# --- pure functions, by hand


def test_mean_and_spread() -> None:
    assert spread([1.0, 2.0, 6.0]) == Spread(3.0, pytest.approx(7**0.5), 3)
    assert spread([2.5]) == Spread(2.5, None, 1)
    assert spread([]) is None


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([-0.3, -0.2, -0.4], BETTER),  # mean −0.3, spread 0.1
        ([0.3, 0.2, 0.4], WORSE),
        ([-0.1, -0.5, -1.0], BETTER),  # −0.533, 0.451
        ([-0.05, -0.05, -1.0], NO_DIFFERENCE),  # −0.367, 0.548
        ([-0.6, 0.01, -0.6], NO_DIFFERENCE),  # one seed disagrees
        ([0.0, 0.0], NO_DIFFERENCE),
        ([-0.3], UNKNOWN),
        ([], UNKNOWN),
    ],
)
def test_a_difference_counts_beyond_its_spread(differences: list[float], expected: str) -> None:
    assert verdict(differences) == expected


def test_rank_correlation_by_hand() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)  # 1 − 6·2 / (4·15)
    assert spearman([1, 2, 3], [5, 4, 3]) == pytest.approx(-1.0)
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(0.75**0.5)  # ranks 1.5, 1.5, 3
    assert spearman([1, 1], [1, 2]) is None


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=9))
def test_rank_correlation_sees_order_alone(pairs: list[tuple[int, int]]) -> None:
    ours, theirs = zip(*pairs, strict=True)
    found = spearman(ours, theirs)
    stretched = spearman([value**3 for value in ours], [7.0 + 2 * value for value in theirs])
    assert (found is None) == (stretched is None)
    if found is not None:
        assert stretched == pytest.approx(found, abs=1e-12)
        assert -1 - 1e-12 <= found <= 1 + 1e-12


# --- settings


def write_comparison(folder: Path, **changes: Any) -> Path:
    """Settings of a comparison, JSON being YAML, with the run of `tiny_config` in a file beside it."""
    tiny_config(folder, control=False, rounds=1)
    content = {
        "run": "config.yaml",
        "seeds": [1, 2],
        "arms": {"random": {"method": "random", "steps_factor": 2}, "no_kl": {"bilevel.gamma": 0}},
    }
    path = folder / "compare.yaml"
    path.write_text(json.dumps(content | changes))
    return path


def test_a_comparison_is_a_run_a_seed_with_its_arms(tmp_path: Path) -> None:
    asked = load_comparison(write_comparison(tmp_path), ["round_steps=9", "seeds=[4]"])
    assert asked.seeds == [4]
    config = asked.run_config(4)
    assert (config.seed, config.round_steps, config.method) == (4, 9, "bliss")
    assert config.controls == [
        ControlConfig("random", "random", 2.0),
        ControlConfig("no_kl", settings={"bilevel.gamma": 0}),
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": []}, "seeds is \\[\\]"),
        ({"seeds": [1, 1]}, "each once"),
        ({"seeds": ["one"]}, "whole numbers"),
        ({"corpus": "mine"}, "corpus is 'mine'"),
        ({"arms": {"x": 3}}, "arms must be settings by name"),
        ({"run": None}, "run must be settings"),
        ({"run": "nowhere.yaml"}, "nowhere.yaml does not exist"),
        ({"armes": {}}, "armes is no key"),
        ({"arms": {"x": {"bilevel.gama": 0}}}, "'x': bilevel.gama"),
        ({"arms": {"x": {"target.lr": 0}}}, "'x': target.lr is the same in all arms"),
    ],
)
def test_a_comparison_that_cannot_work_is_one_sentence(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = write_comparison(tmp_path, **changes)
    with pytest.raises(UserError, match=words):
        load_comparison(path, []).run_config(1)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_ready_configurations_pass_a_dry_run(path: Path, tmp_path: Path) -> None:
    """As they are, but for the data: with a pool that is there, all sizes are known."""
    pool = [{"name": name, "prefixes": [write_chain_shard(tmp_path / name, 600, 1, 0.5)]} for name in ("a", "b")]
    words = [str(path), "corpus=null", f"data.pool={json.dumps(pool)}", f"data.validation={tmp_path / 'a'}"]
    words += ["data.tokenizer.model=tokenizer", "data.tokenizer.vocab_size=256", "seeds=[1]"]
    done = CliRunner().invoke(app, ["compare", *words, "--out", str(tmp_path / "out"), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "not known" not in done.output
    rows = {words[0]: words[1:] for line in done.output.splitlines() if len(words := line.split()) == 6}
    for name in ("bliss", *load_comparison(path, []).arms):
        assert np.isfinite([float(word) for word in rows[name]]).all()
    assert not (tmp_path / "out").exists()


def test_the_papers_questions_have_ready_configurations() -> None:
    """BLISS's ablations, BLADE's numbers and the baselines of issue 6, each an arm of some file."""
    settings = [arm for path in CONFIGS for arm in load_comparison(path, []).arms.values()]
    for asked in (
        {"bilevel.gamma": 0},
        {"bilevel.weights": "naive"},
        {"bilevel.restart_score": True},
        *({"online.sync_interval": interval} for interval in (500, 1000, 2000)),
        *({"online.keep": keep} for keep in (0.4, 0.8)),
        *({"method": "perplexity", "perplexity.keep": keep} for keep in ("low", "middle", "high")),
        *({"method": method} for method in ("random", "all", "dsir", "mates")),
        {"online.method": "rho1"},
    ):
        assert any(asked.items() <= arm.items() for arm in settings), asked
    proxies = load_comparison(CONFIGS[0].with_name("compare-proxy.yaml"), [])
    target = proxies.run_config(1).target.model.preset
    assert proxies.arms["target_as_proxy"] == {"proxy.model.preset": target}


# --- runs


@pytest.fixture
def behaviour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stages that only sleep and write."""
    behaviour = {"journal": str(tmp_path / "journal"), "seconds": 0.0}
    run_all = local.run_all
    monkeypatch.setattr(
        local, "run_all", lambda runs, root: run_all(runs, root, command=fake_command(behaviour)), raising=True
    )
    return behaviour


def begun(tmp_path: Path, before: int = 0) -> list[str]:
    return [name for event, name, _ in journal(tmp_path / "journal")[before:] if event == "begin"]


def test_only_what_is_missing_is_done_when_arms_and_seeds_are_added(
    tmp_path: Path, behaviour: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write_comparison(tmp_path), tmp_path / "out"
    compare.run(load_comparison(path, ["seeds=[1]"]), out)
    [config] = [load_comparison(path, []).run_config(1)]
    assert sorted(begun(tmp_path)) == sorted(stage.name for stage in plan(config, out / "seed-1"))
    before = len(journal(tmp_path / "journal"))
    compare.run(load_comparison(path, ["seeds=[1]"]), out)
    assert "nothing to do" in capsys.readouterr().out
    compare.run(load_comparison(path, ["seeds=[1,2]", "arms.naive={bilevel.weights: naive}"]), out)
    more = begun(tmp_path, before)
    assert more.count("controls/naive/round-0001/bilevel") == 2
    assert more.count("round-0001/bilevel") == 1, "of seed 2"
    assert sorted(compare.seed_dirs(out)) == [1, 2]


def test_a_later_seed_fills_the_core_that_an_earlier_one_leaves(tmp_path: Path, behaviour: dict[str, Any]) -> None:
    out = tmp_path / "out"
    compare.run(load_comparison(write_comparison(tmp_path, arms={}), ["method=random"]), out)
    first, second = (state.read_state(out / f"seed-{seed}")["inventory"] for seed in (1, 2))
    assert first.finished is not None
    assert second.started is not None
    assert second.started < first.finished, "a plan begins with one stage, and two may run"
    spans = [record for seed in (1, 2) for record in state.read_state(out / f"seed-{seed}").values()]
    for record in spans:
        assert sum(other.started <= record.started < other.finished for other in spans) <= 2


def test_another_comparison_in_the_directory_is_refused(tmp_path: Path, behaviour: dict[str, Any]) -> None:
    path, out = write_comparison(tmp_path), tmp_path / "out"
    compare.run(load_comparison(path, ["seeds=[1]"]), out)
    before = journal(tmp_path / "journal")
    for changes, words in [
        (["seeds=[2]", "round_steps=7"], r"seed 1: round_steps: 6 -> 7"),
        (["seeds=[2]", "arms.no_kl={bilevel.gamma: 0.5}"], "arm no_kl"),
    ]:
        with pytest.raises(UserError, match=words):
            compare.run(load_comparison(path, changes), out)
    assert journal(tmp_path / "journal") == before
    assert not (out / "seed-2").exists()


# --- figures from files


def seed_files(out: Path, config: RunConfig, losses: dict[str, float]) -> None:
    """A finished seed: a warm-up of 6 steps, then 6; every arm falls from 5 by so much a step.

    `random` goes on for 12 steps, which is no decay branch at 12: all are compared before the decay.
    """
    run_dir = out / f"seed-{config.seed}"
    prepare(config, run_dir)
    inventory = take_inventory(config)
    for arm in arms(config, run_dir):
        slope, end = losses[arm.name], arm.config.round_end(1)
        write_results(arm.paths, 1, 3, end, lambda i, slope=slope: 5 - slope * (i - 6))
        inventory.write(RunPaths(run_dir).inventory)
        for number in (1, 2):
            (arm.paths.round(number)).mkdir(parents=True, exist_ok=True)
        kept = {"walk": 300, "noise": 100} if arm.name == "bliss" else {"walk": 100, "noise": 300}
        everything = {record.name: np.arange(record.num_sequences, dtype=np.int32) for record in inventory.pool}
        write_selections(arm.paths, inventory, kept, {1: everything, 2: everything})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    asked = load_comparison(write_comparison(tmp_path), [])
    out = tmp_path / "out"
    seed_files(out, asked.run_config(1), {"bliss": 0.1, "random": 0.05, "no_kl": 0.06})
    seed_files(out, asked.run_config(2), {"bliss": 0.11, "random": 0.05, "no_kl": 0.04})
    return out


def test_arms_are_compared_in_pairs(out: Path) -> None:
    found = comparison.write(out)
    assert (found["seeds"], found["main_arm"], found["iteration"]) == ([1, 2], "bliss", 12)
    assert found["measure"] == "before decay"
    bliss, no_kl, random = (found["arms"][name] for name in ("bliss", "no_kl", "random"))
    # after 6 steps: random 4.7; bliss 4.4 and 4.34; no_kl 4.64 and 4.76
    assert bliss["test_loss"]["mean"] == pytest.approx(4.37)
    assert bliss["difference"]["mean"] == pytest.approx(-0.33)
    assert bliss["difference"]["std"] == pytest.approx(0.06 / 2**0.5)
    assert (bliss["verdict"], no_kl["verdict"], random["verdict"]) == (BETTER, NO_DIFFERENCE, UNKNOWN)
    assert no_kl["difference"]["mean"] == pytest.approx(0.0)
    assert (random["difference"], random["speedup_over_random"]) == (None, None)
    assert bliss["domain_difference"]["noise"]["mean"] == pytest.approx(-0.33)
    # random ends at 4.4 after twice the steps: enough for seed 1, not for seed 2
    assert bliss["speedup_over_random"] == {
        "mean": pytest.approx(2.0), "std": pytest.approx(0.0, abs=1e-9), "count": 2, "lower_bound": True,
    }  # fmt: skip
    assert bliss["speedup_over_all"] is None
    assert no_kl["speedup_over_random"]["lower_bound"] is False
    assert no_kl["speedup_over_random"]["mean"] == pytest.approx((7.2 / 6 + 4.8 / 6) / 2)
    assert bliss["train_flops"]["mean"] == random["train_flops"]["mean"]
    assert bliss["selection_flops"]["mean"] > random["selection_flops"]["mean"] == 0
    assert found["rank_correlation"]["bliss"]["random"]["kept"]["mean"] == pytest.approx(-1.0)
    assert found == read_json(comparison.result_path(out))


def test_a_domains_mean_score_leaves_out_what_was_not_scored(out: Path) -> None:
    [one, _] = comparison.seed_runs(out)
    paths = RunPaths(out / "seed-1")
    paths.scores(1).mkdir()
    least = np.finfo(np.float32).min
    for place, name in enumerate(("walk", "noise")):
        np.save(paths.scores(1) / f"{name}.npy", np.array([1 + place, np.nan, least, 3 + place], np.float32))
    write_json(paths.scores(1) / "manifest.json", {"schema": 1})
    assert comparison._mean_scores(one.arm("bliss")) == {"noise": 3.0, "walk": 2.0}


def test_whether_arms_prefer_the_same_domains_is_a_rank_correlation(out: Path) -> None:
    """As of a proxy and of the target in its place: what they keep, and how they score; two seeds, two domains."""
    for seed in (1, 2):
        paths = RunPaths(out / f"seed-{seed}")
        for arm, scores in ((paths, {"walk": 1, "noise": 2}), (paths.control("no_kl"), {"walk": 5, "noise": 8})):
            for name, score in scores.items():
                arm.scores(1).mkdir(exist_ok=True)
                np.save(arm.scores(1) / f"{name}.npy", np.full(4, score, np.float32))
            write_json(arm.scores(1) / "manifest.json", {"schema": 1})
    comparison_page.write(out)
    found = comparison.read(out)["rank_correlation"]["bliss"]
    # no_kl keeps the domains the other way round, though it scores them in the same order
    assert found["no_kl"]["score"] == {"mean": pytest.approx(1.0), "std": pytest.approx(0.0), "count": 2}
    assert found["no_kl"]["kept"]["mean"] == pytest.approx(-1.0)
    assert found["random"]["score"] is None
    row = "<td>bliss, no_kl</td><td>-1.00 ± 0.00</td><td>1.00 ± 0.00</td>"
    assert row in (out / "comparison.html").read_text()


def test_how_well_influences_are_predicted_is_a_mean_over_rounds(out: Path) -> None:
    directory = RunPaths(out / "seed-1").influence_model(1)
    write_json(directory / "fit.json", {"schema": 1, "held_out_spearman": 0.4})
    found = comparison.write(out)["arms"]["bliss"]
    assert found["seeds"]["1"]["influence_correlation"] == pytest.approx(0.4)
    assert found["influence_correlation"]["count"] == 1
    assert result.demo_result(out / "seed-1")["arms"]["bliss"]["influence_correlation"] == pytest.approx(0.4)
    files = collect.collect(out / "seed-1").arms[0]
    [entry] = files.rounds
    later = replace(entry, influence_correlation=0.6), replace(entry, influence_correlation=None)
    assert replace(files, rounds=[entry, *later]).influence_correlation == pytest.approx(0.5)


def test_reference_work_counts_as_selection(out: Path) -> None:
    before = comparison.write(out)["arms"]["no_kl"]["seeds"]["1"]
    path = out / "seed-1/run.yaml"
    path.write_text(
        path.read_text().replace("    bilevel.gamma: 0\n", "    bilevel.gamma: 0\n    online.method: self\n")
    )
    now = comparison.write(out)["arms"]["no_kl"]["seeds"]["1"]
    # a forward pass, a third of a step, in each of the 6 steps after the 6 of the warm-up
    reference = before["train_flops"] / 12 * 6 / 3
    assert now["selection_flops"] - before["selection_flops"] == pytest.approx(reference)
    assert now["train_flops"] == before["train_flops"]


def test_the_page_and_the_sentences_say_what_came_out(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison_page.write(out)
    shown, html = capsys.readouterr().out, (out / "comparison.html").read_text()
    for sentence in (
        "bliss is better than random by 0.330 nats, more than the spread over seeds.",
        "no_kl is no different from random: 0.000 apart, within the spread over seeds.",
    ):
        assert sentence.replace("apart", "nats apart") in shown or sentence in shown
    assert "&gt; 2.0" in html
    assert (out / "comparison.svg").read_text() in html
    assert html.count("<svg") == 3
    assert "http" not in html.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")


def test_an_unfinished_comparison_shows_what_there_is(out: Path) -> None:
    (out / "seed-2/controls/no_kl/round-0001/evaluation/results.json").unlink()
    (out / "seed-1/round-0001/evaluation/results.json").unlink()
    found = comparison.write(out)
    assert found["arms"]["no_kl"]["test_loss"] == {"mean": pytest.approx(4.64), "std": None, "count": 1}
    assert found["arms"]["no_kl"]["verdict"] == UNKNOWN
    assert list(found["arms"]["bliss"]["seeds"]) == ["2"]
    with pytest.raises(UserError, match="holds no comparison"):
        comparison.write(out / "seed-1")


def test_wall_time_is_what_the_trainings_waited_for(out: Path) -> None:
    run_dir = out / "seed-1"
    stages = {}
    for place, stage in enumerate(plan(load_comparison(out.parent / "compare.yaml", []).run_config(1), run_dir)):
        stages[stage.name] = {"status": "done", "started": 0.0, "finished": float(2**place)}
    write_json(run_dir / "state.json", {"schema": 1, "stages": stages})
    took = {name: record["finished"] for name, record in stages.items()}
    one = comparison.seed_runs(out)[0]
    bliss, random = (comparison.stage_seconds(one, one.arm(name)) for name in ("bliss", "random"))
    parts = ("warmup-proxy", "round-0001/bilevel", "round-0001/score", "round-0001/select")
    assert bliss == (sum(took[name] for name in parts), took["round-0001/pretrain"])
    assert random == (took["controls/random/round-0001/select"], took["controls/random/round-0001/pretrain"])
    assert np.isclose(
        comparison.comparison([one])["arms"]["random"]["train_s"]["mean"],
        took["controls/random/round-0001/pretrain"] / 2,
    )


@pytest.mark.slow
def test_a_comparison_of_real_runs_with_an_arm_that_shares_little(tmp_path: Path) -> None:
    """One arm has another proxy and another validation set; killed or not, called again there is nothing to do."""
    own = {"proxy.model.hidden_size": 64, "data.validation": write_chain_shard(tmp_path / "other", 64, 5, noise=0.9)}
    path = write_comparison(tmp_path, arms={"random": {"method": "random"}, "other": own})
    done = megatron_bliss("compare", path, "--out", tmp_path / "out", timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_json(tmp_path / "out" / "comparison.json")
    assert found["measure"] == "after decay"
    for name in ("bliss", "random", "other"):
        arm = found["arms"][name]
        assert arm["test_loss"]["count"] == 2
        assert np.isfinite(arm["test_loss"]["mean"])
    ours = [found["arms"]["bliss"]["seeds"][seed]["test_loss"] for seed in ("1", "2")]
    random = [found["arms"]["random"]["seeds"][seed]["test_loss"] for seed in ("1", "2")]
    assert ours[0] != ours[1]
    paired = [one - other for one, other in zip(ours, random, strict=True)]
    assert found["arms"]["bliss"]["difference"]["mean"] == pytest.approx(np.mean(paired))
    assert found["arms"]["other"]["selection_flops"]["mean"] > found["arms"]["bliss"]["selection_flops"]["mean"]
    for seed in (1, 2):
        arm = tmp_path / f"out/seed-{seed}/controls/other"
        assert (arm / "warmup/proxy").is_dir()
        assert read_json(arm / "inventory.json")["validation"]["prefix"] == str(tmp_path / "other")
        assert not (arm / "warmup/target").exists()
    again = megatron_bliss("compare", path, "--out", tmp_path / "out")
    assert "nothing to do" in again.stdout
    assert read_json(tmp_path / "out" / "comparison.json") == found
