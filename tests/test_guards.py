"""What guards do about scores and losses that are not to be trusted, in files and with real score models."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bliss.artifacts import RunPaths, read_json, write_json
from megatron_bliss.config import read_saved_config
from megatron_bliss.data.score_check import ScoreCheck, check_scores
from megatron_bliss.data.scores import ScoreWriter
from megatron_bliss.data.selection import Selection
from megatron_bliss.errors import StageError
from megatron_bliss.inspection.overview import overview
from megatron_bliss.inspection.rounds import Run
from megatron_bliss.orchestration import state
from megatron_bliss.orchestration.plan import plan
from megatron_bliss.report import page
from megatron_bliss.stages import guards, inventory, select
from megatron_bliss.stages.inventory import run_inventory
from tests import report_page
from tests.distributed import run_ranks
from tests.fake_run import fake_config
from tests.guard_ranks import rolled_back
from tests.side_models import edit_config
from tests.test_data_stages import slicing_of, start
from tests.tiny_run import tiny_config


def write_scores(run: Path, number: int, spread: float) -> None:
    slicing = slicing_of(run)
    wanted = slicing.ids_by_name(number)
    writer = ScoreWriter(
        RunPaths(run).scores(number), slicing.records, wanted, method="bliss", model_digest="m", seed=1,
        chunk_sequences=50,
    )  # fmt: skip
    for chunk in writer.pending():
        writer.write(chunk, np.linspace(0, spread, len(chunk.ids), dtype=np.float32))


def write_loss(run: Path, number: int, loss: float) -> None:
    decay = {"validation_loss": loss, "test_loss": None, "domain_loss": {}}
    place = {"schema": 1, "iteration": number, "tokens_trained": number}
    write_json(RunPaths(run).evaluation(number) / "results.json", place | {"decay": decay, "curve": []})


def ask(run: Path, number: int) -> guards.Guarded | None:
    config = read_saved_config(RunPaths(run).config)
    return guards.ask(RunPaths(run), config, run_inventory(run, config), number)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return start(tmp_path / "run", "rounds=4", "guards.action=random")


def test_a_constant_is_told_from_scores(run: Path) -> None:
    write_scores(run, 1, spread=2.0)
    pool = run_inventory(run, read_saved_config(RunPaths(run).config)).pool
    found = check_scores(RunPaths(run).scores(1), pool)
    assert found.spread == pytest.approx(1.6, abs=0.05)  # of 0 to 2, without a tenth at either end
    assert found.unscored == 0
    assert ask(run, 1) is None
    path = next(RunPaths(run).scores(1).glob("*.npy"))
    scores = np.load(path)
    scores[~np.isnan(scores)] = np.finfo(np.float32).min
    np.save(path, scores)
    assert 0.2 < check_scores(RunPaths(run).scores(1), pool).unscored < 0.6
    assert check_scores(RunPaths(run).scores(4), pool) == ScoreCheck(0, 0.0, 1.0)


def test_a_random_selection_of_the_same_size_takes_the_place_of_a_constant(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = RunPaths(run)
    write_scores(run, 2, spread=1e-4)
    edit_config(run, guards__action="none")
    assert ask(run, 2) is None
    select.run(run, 2)
    kept = Selection.open(paths.selection(2))
    edit_config(run, guards__action="random")
    found = ask(run, 2)
    assert found == guards.Guarded("random", found.reasons if found else [], trusted_round=1)
    select.run(run, 2)
    said = capsys.readouterr().out
    assert "are all but the same: their 10th and 90th percentile are " in said
    assert " apart (guards.score_spread=0.001)" in said
    assert "[select] guards: round 2 is not trusted: its selection is a random one of the same size" in said
    instead = Selection.open(paths.selection(2))
    assert instead.manifest["method"] == "random"
    assert instead.manifest["guard"]["reasons"] == found.reasons
    assert "guard" not in kept.manifest
    assert instead.counts.kept_tokens == pytest.approx(kept.counts.kept_tokens, rel=0.03)
    assert instead.digest != kept.digest
    assert guards.trusted_round(paths, 2) == 1
    assert overview(Run(run).round(2), 1)["method"] == "random"
    page.write(run)
    facts, read = read_json(run / "report.json"), report_page.read((run / "report.html").read_text())
    assert facts["rounds"][1]["guard"]["action"] == "random"
    assert {facts["rounds"][1]["guard"]["sentence"], *found.reasons} <= set(read.words)


def test_a_loss_that_rose_distrusts_the_round_it_rose_in(run: Path) -> None:
    paths = RunPaths(run)
    for number, loss in ((1, 3.0), (2, 3.05), (3, 3.2)):
        write_loss(run, number, loss)
        write_scores(run, number + 1, spread=1.0)
    assert ask(run, 2) is None, "there is nothing to compare the first round with"
    assert ask(run, 3) is None, "less than guards.loss_increase"
    found = ask(run, 4)
    assert found
    assert found.reasons == [
        "The LLM's validation loss rose from 3.050 to 3.200 in round 3 (guards.loss_increase=0.1)."
    ]
    assert found.trusted_round == 2, "round 3's model chose what it got worse on"
    assert guards.trusted_round(paths, 4) == 2
    edit_config(run, guards__action="rollback")
    assert ask(run, 4) == guards.Guarded("rollback", found.reasons, 2)
    edit_config(run, guards__loss_increase=0.5)
    assert ask(run, 4) is None
    assert not paths.guard(4).exists()


def test_a_rollback_without_an_earlier_model_is_random_and_a_stop_says_how_to_go_on(run: Path) -> None:
    write_scores(run, 1, spread=0.0)
    edit_config(run, guards__action="rollback")
    found = ask(run, 1)
    assert found
    assert (found.action, found.trusted_round) == ("random", 0)
    edit_config(run, guards__action="stop")
    with pytest.raises(StageError, match=r"Stopped, as guards.action=stop says. To go on, .* guards.action=random"):
        ask(run, 1)
    assert read_json(RunPaths(run).guard(1))["action"] == "stop"


def test_what_guards_did_is_in_the_state(run: Path) -> None:
    write_scores(run, 1, spread=0.0)
    ask(run, 1)
    config = read_saved_config(RunPaths(run).config)
    [stage] = [stage for stage in plan(config, run) if stage.name == "round-0001/score"]
    state.begin(run, stage, pid=1, log=run / "log", log_offset=0, inputs={})
    note = "guards: round 1 is not trusted: its selection is a random one of the same size"
    assert state.finish(run, stage).note == note


def test_the_plan_asks_before_it_selects_again(tmp_path: Path) -> None:
    for action in ("none", "random"):
        config = fake_config()
        config.guards.action = action
        stages = {stage.name: stage for stage in plan(config, tmp_path)}
        has_guards = action != "none"
        assert ("round-0001/evaluate" in stages["round-0002/score"].needs) == has_guards
        assert ("round-0001/score" in stages["round-0002/bilevel"].needs) == has_guards
        guard = RunPaths(tmp_path).guard(2)
        assert guard in stages["round-0002/select"].inputs, "even without, so that a round that is done stays done"


# --- with real models


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("guards")
    run = folder / "run"
    run.mkdir()
    shutil.copy(tiny_config(folder, control=False, rounds=3), run / "run.yaml")
    inventory.run(run)
    return run_ranks(rolled_back, 1, run, timeout=300)[0] | {"run": run}


def test_good_scores_pass_and_bad_ones_are_only_named_without_an_action(found: dict[str, Any]) -> None:
    assert "[guards]" not in found["good"]
    assert "[guards] The scores of round 2 are all but the same" in found["none"]
    assert not found["good guard"]
    assert not found["none guard"]


def test_a_stop_ends_the_stage_and_keeps_select_from_going_on(found: dict[str, Any]) -> None:
    assert "StageError: The scores of round 2 are all but the same" in found["stop"]
    assert "UserError: guards stopped the run here" in found["stopped select"]


def test_a_rollback_scores_with_the_model_that_was_trusted(found: dict[str, Any]) -> None:
    assert found["rollback guard"]["trusted_round"] == 1
    assert found["same model"]
    assert np.nanstd(found["rollback scores"]) > 100 * np.nanstd(found["own scores"])
    assert np.array_equal(np.isnan(found["rollback scores"]), np.isnan(found["own scores"])), "the same sequences"
    assert "its selection is made by the score model of round 1" in found["rollback select"]
    assert found["manifest"]["method"] == "bliss"
    assert found["manifest"]["guard"]["action"] == "rollback"
    thresholds = [value for value in found["manifest"]["thresholds"].values() if value is not None]
    assert thresholds[0] == pytest.approx(np.nanquantile(found["rollback scores"], 0.8), abs=0.05)


def test_what_is_not_trusted_is_not_carried_on(found: dict[str, Any]) -> None:
    assert found["next starts from"] == RunPaths(found["run"]).bilevel(1)
    assert "100.0% of the scores of round 3 are not a number" in found["again"]
    assert (found["again guard"]["action"], found["again guard"]["trusted_round"]) == ("rollback", 1)
    assert "got NaN as its score" in found["nan without an action"]
