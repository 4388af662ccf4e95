"""Plan, state and local launcher, with stages that only sleep and write: kills, resumes, failures, side by side."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console

from megatron_bliss.config import (
    ControlConfig,
    LaunchConfig,
    RunConfig,
    TargetConfig,
    load_config,
    read_saved_config,
    save_config,
)
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.shards import ShardWriter, take_inventory
from megatron_bliss.errors import StageError, UserError
from megatron_bliss.orchestration import cost, local, state
from megatron_bliss.orchestration.check import check
from megatron_bliss.orchestration.heartbeat import Heartbeat
from megatron_bliss.orchestration.logs import Pace, user_error
from megatron_bliss.orchestration.plan import Stage, arms, by_urgency, plan
from megatron_bliss.orchestration.processes import RUN_VARIABLE
from megatron_bliss.progress import Reading
from megatron_bliss.stages.inventory import look_for_contamination
from tests.fake_run import POLL_INTERVAL, fake_command, fake_config, journal

EVERY_METHOD = [
    fake_config(),
    fake_config(method="random", controls=[]),
    fake_config(
        method="perplexity", rounds=3, controls=[ControlConfig("bliss", "bliss"), ControlConfig("random", "random")]
    ),
]


# --- plan


@pytest.mark.parametrize("config", EVERY_METHOD)
def test_every_need_and_input_is_made_by_a_stage_before(config: RunConfig, tmp_path: Path) -> None:
    made: dict[Path, str] = {}
    for stage in plan(config, tmp_path):
        assert set(stage.needs) <= set(made.values())
        # what guards did is there only if they did something
        inside = [path for path in stage.inputs if path.is_relative_to(tmp_path) and path.name != "guard.json"]
        assert all(path in made and made[path] in stage.needs for path in inside), stage.name
        for path in stage.outputs:
            assert path not in made, "one stage makes a file"
            made[path] = stage.name


def test_stages_of_the_methods(tmp_path: Path) -> None:
    def commands(method: str) -> set[str]:
        return {stage.command[0] for stage in plan(fake_config(method=method, controls=[]), tmp_path)}

    assert commands("bliss") - commands("perplexity") == {"bilevel", "fidelity"}
    assert commands("perplexity") - commands("random") == {"score", "warmup-proxy"}
    assert {"select", "pretrain", "evaluate", "report"} <= commands("random")


def test_only_real_dependencies_are_drawn(tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in plan(fake_config(), tmp_path)}

    def ancestors(name: str) -> set[str]:
        direct = stages[name].needs
        return set(direct).union(*(ancestors(need) for need in direct))

    assert "round-0001/pretrain" in ancestors("round-0002/bilevel")
    assert "round-0001/evaluate" not in ancestors("round-0002/bilevel")
    assert "warmup-proxy" not in ancestors("warmup-target")
    assert not {name for name in ancestors("controls/random/round-0002/pretrain") if name.startswith("round-")}
    assert set(stages) - {"report"} == ancestors("report")


def test_commands_name_run_and_round(tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in plan(fake_config(launch=LaunchConfig(nproc_per_node=4)), tmp_path)}
    control = stages["controls/random/round-0002/pretrain"]
    assert control.command == ("pretrain", "--run", str(tmp_path / "controls/random"), "--round", "2")
    assert control.num_ranks == 4
    assert control.outputs == (tmp_path / "controls/random/target/iter_0010024",)  # 10000 + 2 rounds of twice 6
    assert stages["round-0001/select"].num_ranks == 1
    assert "megatron_bliss.torchrun" in local.stage_command(control)
    assert "megatron_bliss.torchrun" not in local.stage_command(stages["round-0001/select"])


def test_a_run_from_another_ones_warmup_has_none_of_its_own(tmp_path: Path) -> None:
    config = fake_config()
    config = replace(config, warmup=replace(config.warmup, start_from=str(tmp_path / "first")))
    stages = {stage.name: stage for stage in plan(config, tmp_path / "second")}
    assert not [name for name in stages if name.startswith("warmup")]
    assert tmp_path / "first/warmup/target" in stages["controls/random/round-0001/pretrain"].inputs
    assert "controls/random/inventory" in stages


def test_an_arm_with_a_proxy_of_its_own_shares_the_targets_warmup(tmp_path: Path) -> None:
    large = ControlConfig("large", settings={"proxy.model.preset": "pythia-70m"})
    stages = {stage.name: stage for stage in plan(fake_config(controls=[large]), tmp_path)}
    proxy, arm = stages["controls/large/warmup-proxy"], tmp_path / "controls/large"
    assert (proxy.inputs, proxy.needs) == ((tmp_path / "warmup/selection",), ("warmup-select",))
    assert proxy.outputs == (arm / "warmup/proxy",)
    assert arm / "warmup/proxy" in stages["controls/large/round-0002/bilevel"].inputs
    assert "controls/large/warmup-proxy" in stages["controls/large/round-0002/bilevel"].needs
    assert tmp_path / "warmup/target" in stages["controls/large/round-0001/pretrain"].inputs
    assert not {"controls/large/warmup-target", "controls/large/inventory"} & set(stages)
    alone = plan(fake_config(method="random", controls=[replace(large, method="bliss")]), tmp_path)
    assert "warmup-proxy" not in {stage.name for stage in alone}


def test_an_arm_with_a_validation_set_of_its_own_has_an_inventory_of_its_own(tmp_path: Path) -> None:
    exchanged = ControlConfig("exchanged", settings={"data.validation": "/nowhere/other"})
    stages = {stage.name: stage for stage in plan(fake_config(controls=[exchanged]), tmp_path)}
    inventory = stages["controls/exchanged/inventory"]
    assert Path("/nowhere/other.bin") in inventory.inputs
    assert inventory.outputs[0] in stages["controls/exchanged/round-0001/bilevel"].inputs
    assert "warmup-proxy" in stages["controls/exchanged/round-0001/bilevel"].needs


# --- what is checked before a run starts


def loaded(*overrides: str) -> RunConfig:
    needed = ["data.validation=valid", "data.tokenizer.vocab_size=256", "data.pool=[{name: web, prefixes: [web]}]"]
    return load_config(None, [*needed, *overrides])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["warmup.proxy_steps=0"], "warmup.proxy_steps is 0"),
        (["method=random", "warmup.proxy_steps=0", "controls=[{name: p, method: perplexity}]"], "proxy_steps is 0"),
        (["warmup.target_steps=0"], "warmup.target_steps is 0, but the KL term"),
        (["target.model.preset=huge"], "target.model: model preset 'huge'"),
        (["proxy.model.preset=huge"], "proxy.model: model preset 'huge'"),
        (["proxy.model.num_attention_heads=7"], "not a multiple of num_attention_heads 7"),
        (["launch.nproc_per_node=3", "target.tensor_parallel=3"], "target.model: num_attention_heads is 16"),
        (["launch.nproc_per_node=2", "bilevel.batch_size=3"], "bilevel.batch_size is 3"),
        (["launch.nproc_per_node=2", "bilevel.validation_batch_size=3"], "bilevel.validation_batch_size is 3"),
        (["launch.nproc_per_node=2", "warmup.proxy_batch_size=3"], "warmup.proxy_batch_size is 3"),
        (["target.global_batch_size=12"], "target.global_batch_size is 12; it must be a multiple of 8"),
        (["launch.nproc_per_node=2", "proxy.tensor_parallel=2", "bilevel.preset=paper"], "curvature is 'exact'"),
        (
            ["launch.nproc_per_node=3", "proxy.tensor_parallel=2", "target.global_batch_size=24"],
            "launch.nproc_per_node is 3",
        ),
        (["launch.nproc_per_node=2", "target.tensor_parallel=2", "target.pipeline_parallel=2"], "a multiple of 4"),
        (["warmup.start_from=/nowhere/run"], "has no run.yaml"),
        (["controls=[{name: v, settings: {data.validation: other}}]"], "'v' has a data.validation of its own"),
        (["controls=[{name: p, settings: {proxy.model.preset: huge}}]"], "'p': proxy.model: model preset 'huge'"),
        (["controls=[{name: p, settings: {warmup.proxy_steps: 0}}]"], "'p': warmup.proxy_steps is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(
    tmp_path: Path, overrides: list[str], words: str
) -> None:
    config = loaded(*overrides)
    for start in (local.run, cost.show):
        with pytest.raises(UserError, match=re.escape(words)):
            start(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=random", "warmup.proxy_steps=0", "warmup.target_steps=0"],
        ["warmup.target_steps=0", "bilevel.gamma=0"],
        ["launch.nproc_per_node=4", "proxy.tensor_parallel=2", "target.tensor_parallel=2", "bilevel.batch_size=2"],
    ],
)
def test_settings_that_can_work_pass(tmp_path: Path, overrides: list[str]) -> None:
    check(loaded(*overrides), tmp_path / "run")


def test_a_warmup_of_another_run_must_have_been_made_with_the_same_settings(tmp_path: Path) -> None:
    first = tmp_path / "first"
    save_config(loaded("rounds=2"), first / "run.yaml")
    start = f"warmup.start_from={first}"
    check(loaded("rounds=2", start, "method=random", "round_steps=7"), tmp_path / "second")
    for change in ("seed=5", "rounds=3", "data.held_out=7", "proxy.model.preset=tiny", "warmup.target_steps=9"):
        with pytest.raises(UserError, match=re.escape(change.split("=")[0] + ": ")):
            check(loaded("rounds=2", start, change), tmp_path / "second")
    save_config(loaded("rounds=2", start), tmp_path / "second/run.yaml")
    with pytest.raises(UserError, match="no warm-up of its own"):
        check(loaded("rounds=2", f"warmup.start_from={tmp_path / 'second'}"), tmp_path / "third")


# --- state


def test_why_a_stage_is_run_again(tmp_path: Path) -> None:
    source, made = tmp_path / "source", tmp_path / "made"
    stage = replace(plan(fake_config(), tmp_path)[0], inputs=(source,), outputs=(made,))

    def why() -> str | None:
        return state.why_not_done(tmp_path, stage, state.read_state(tmp_path).get(stage.name))

    source.write_text("1")
    assert why() == "not run yet"
    state.begin(tmp_path, stage, os.getpid(), tmp_path / "log", 0, state.digests(tmp_path, stage.inputs))
    assert why() == "it was interrupted"
    state.fail(tmp_path, stage, "boom")
    assert why() == "it failed"
    state.begin(tmp_path, stage, os.getpid(), tmp_path / "log", 0, state.digests(tmp_path, stage.inputs))
    made.write_text("x")
    assert state.finish(tmp_path, stage).attempts == 2
    assert why() is None
    source.write_text("2")
    assert why() == "source changed"
    source.unlink()
    assert why() == f"source is not there, seen from {Path.cwd()}"
    source.write_text("1")
    assert why() is None
    made.write_text("y")
    assert why() == "made is not what it wrote"
    made.unlink()
    assert why() == "made is gone"


def test_a_changed_output_is_refused_and_a_new_report_is_not(tmp_path: Path) -> None:
    config = fake_config(controls=[])
    state.prepare(config, tmp_path)
    for stage in plan(config, tmp_path):
        if stage.command[0] in ("inventory", "report"):
            state.begin(tmp_path, stage, os.getpid(), tmp_path / "log", 0, {})
            for path in stage.outputs:
                path.write_text("{}")
            state.finish(tmp_path, stage)
    (tmp_path / "report.html").write_text("another")
    state.prepare(config, tmp_path)
    (tmp_path / "inventory.json").write_text("another")
    with pytest.raises(UserError, match=r"inventory\.json is not what inventory wrote"):
        state.prepare(config, tmp_path)


def test_digests_of_directories(tmp_path: Path) -> None:
    assert state.digest(tmp_path / "nothing") is None
    (tmp_path / "weights").write_bytes(b"123")
    tree = state.digest(tmp_path)
    (tmp_path / "weights").write_bytes(b"1234")
    assert state.digest(tmp_path) != tree
    (tmp_path / "manifest.json").write_text("{}")
    manifest = state.digest(tmp_path)
    (tmp_path / "weights").write_bytes(b"12345")
    assert state.digest(tmp_path) == manifest, "where there is a manifest it speaks for the directory"


def test_an_inventory_that_finds_the_validation_set_in_the_pool_says_so(tmp_path: Path) -> None:
    config, run = fake_config(), tmp_path / "run"
    state.prepare(config, run)
    stage = next(stage for stage in plan(config, run) if stage.command[0] == "inventory")
    random = np.random.default_rng(0)
    texts = [random.integers(0, 100, 40) for _ in range(20)]
    sequences = {"pool": [*texts, texts[0]], "valid": texts, "other": [row[::-1] for row in texts]}
    for prefix, rows in sequences.items():
        with ShardWriter(tmp_path / prefix, np.uint16) as writer:
            for row in rows:
                writer.add_document([row])
    pool = take_inventory({"web": [str(tmp_path / "pool")]})
    note = "100% of the set valid stand word for word in the pool"
    for name, expected in (("valid", note), ("other", "")):
        [record] = take_inventory({name: [str(tmp_path / name)]})
        look_for_contamination(run / "contamination.json", Inventory(pool, {name: record}, None), 1_000_000)
        state.begin(run, stage, 1, run / "log", 0, {})
        assert state.finish(run, replace(stage, outputs=())).note == expected


def _note_stages(run: str, first: int) -> None:
    stage = plan(fake_config(), Path(run))[0]
    for number in range(first, first + 20):
        named = replace(stage, name=f"stage-{number}")
        state.begin(Path(run), named, 1, Path(run) / "log", 0, {})
        state.finish(Path(run), named)


def test_processes_update_the_state_side_by_side(tmp_path: Path) -> None:
    call = "import sys; from tests.test_orchestration import _note_stages; _note_stages(sys.argv[1], int(sys.argv[2]))"
    writers = [
        subprocess.Popen([sys.executable, "-c", call, str(tmp_path), str(first)]) for first in (0, 20)
    ]  # fmt: skip
    assert [writer.wait(60) for writer in writers] == [0, 0]
    records = state.read_state(tmp_path)
    assert len(records) == 40
    assert {record.status for record in records.values()} == {"done"}


# --- launcher


@pytest.fixture
def behaviour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of stages that take no time, so that what the launcher waits between two looks would be most of it."""
    monkeypatch.setattr(local, "_POLL_INTERVAL", POLL_INTERVAL)
    return {"journal": str(tmp_path / "journal"), "seconds": 0.02}


def drive(config: RunConfig, run: Path, behaviour: dict[str, Any]) -> subprocess.Popen[str]:
    """The launcher as a process of its own, which heeds SIGINT even if the tests run in a shell's background."""
    settings = run.parent / "settings.yaml"
    save_config(config, settings)
    words = [sys.executable, "-m", "tests.fake_run", str(settings), str(run), json.dumps(behaviour)]
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # type: ignore[arg-type, return-value]
    )


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def processes_of(run: Path) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(RUN_VARIABLE) == str(run):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_a_run_does_every_stage_once_and_then_nothing(
    tmp_path: Path, behaviour: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = fake_config(), tmp_path / "run"
    local.run(config, run, command=fake_command(behaviour))
    noted, before = journal(tmp_path / "journal"), (run / "state.json").read_bytes()
    stages = [stage.name for stage in plan(config, run)]
    assert sorted(name for event, name, *_ in noted if event == "end") == sorted(stages)
    assert {record.status for record in state.read_state(run).values()} == {"done"}
    assert (run / "logs/controls/random/round-0001/select.log").exists()
    order = {entry[:2]: place for place, entry in enumerate(noted)}
    for stage in plan(config, run):
        assert all(order["end", need] < order["begin", stage.name] for need in stage.needs)
    capsys.readouterr()
    local.run(config, run, command=fake_command(behaviour))
    assert "nothing to do" in capsys.readouterr().out
    assert journal(tmp_path / "journal") == noted
    assert (run / "state.json").read_bytes() == before


def test_a_terminal_gets_bars_and_a_line_for_each_stage_that_is_done(tmp_path: Path, behaviour: dict[str, Any]) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    config = fake_config(method="random", rounds=1, controls=[])
    local.run(config, tmp_path / "run", command=fake_command(behaviour | {"seconds": 0.6}), console=console)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    for stage in plan(config, tmp_path):
        assert re.search(rf"✓ {re.escape(stage.name)} done in 0:0\d:\d\d", shown)
    assert re.search(r"inventory +━.+5/10 0:0\d:\d\d 1.2k tokens/s \| ETA", shown)
    assert "next: warmup-select, warmup-prepare, round-0001/select, warmup-target and 4 more" in shown


def test_independent_stages_run_side_by_side(tmp_path: Path, behaviour: dict[str, Any]) -> None:
    config = fake_config(rounds=1, launch=LaunchConfig(concurrency=3))
    together = {"meet": ["warmup-target", "warmup-proxy", "controls/random/round-0001/select"]}
    local.run(config, tmp_path / "run", command=fake_command(behaviour | together))


def test_no_more_stages_run_side_by_side_than_allowed(tmp_path: Path, behaviour: dict[str, Any]) -> None:
    config = fake_config(rounds=1, launch=LaunchConfig(concurrency=1))
    local.run(config, tmp_path / "run", command=fake_command(behaviour))
    assert [event for event, *_ in journal(tmp_path / "journal")] == ["begin", "end"] * len(plan(config, tmp_path))


def test_a_changed_config_is_refused_but_the_launch_may_change(tmp_path: Path, behaviour: dict[str, Any]) -> None:
    config, run = fake_config(rounds=1), tmp_path / "run"
    local.run(config, run, command=fake_command(behaviour))
    local.run(replace(config, launch=LaunchConfig(concurrency=1)), run, command=fake_command(behaviour))
    changed = replace(config, seed=5, bilevel=replace(config.bilevel, gamma=0.5))
    with pytest.raises(UserError, match=r"bilevel.gamma: 0.01 -> 0.5; seed: 1234 -> 5"):
        local.run(changed, run, command=fake_command(behaviour))


def test_control_arms_may_be_added_and_left_out(tmp_path: Path, behaviour: dict[str, Any]) -> None:
    config, run = fake_config(rounds=1), tmp_path / "run"
    local.run(config, run, command=fake_command(behaviour))
    before = len(journal(tmp_path / "journal"))
    more = replace(config, controls=[*config.controls, ControlConfig("no_kl", settings={"bilevel.gamma": 0})])
    local.run(more, run, command=fake_command(behaviour))
    begun = [name for event, name, *_ in journal(tmp_path / "journal")[before:] if event == "begin"]
    assert {name for name in begun if not name.startswith("controls/no_kl/")} == {"report"}
    assert [arm.name for arm in arms(read_saved_config(run / "run.yaml"), run)] == ["bliss", "random", "no_kl"]
    before = len(journal(tmp_path / "journal"))
    local.run(replace(config, controls=more.controls[1:]), run, command=fake_command(behaviour))
    assert {name for _, name, *_ in journal(tmp_path / "journal")[before:]} == {"report"}
    saved = (run / "run.yaml").read_bytes()
    changed = replace(config, controls=[ControlConfig("no_kl", settings={"bilevel.gamma": 0.5})])
    with pytest.raises(UserError, match=r"controls/no_kl was started with other settings \(bilevel.gamma: 0.0 -> 0.5"):
        local.run(changed, run, command=fake_command(behaviour))
    assert (run / "run.yaml").read_bytes() == saved


def test_only_what_depends_on_a_changed_file_is_run_again(tmp_path: Path, behaviour: dict[str, Any]) -> None:
    config, run, shard = fake_config(rounds=1), tmp_path / "run", tmp_path / "valid.bin"
    config = replace(config, data=replace(config.data, validation=str(shard.with_suffix(""))))
    local.run(config, run, command=fake_command(behaviour))
    (tmp_path / "journal").unlink()
    shard.write_text("another validation set")
    local.run(config, run, command=fake_command(behaviour))
    # what it wrote is what was there before, so nothing after it had to follow
    assert {name for _, name, *_ in journal(tmp_path / "journal")} == {"inventory"}
    assert state.read_state(run)["inventory"].attempts == 2


def test_a_failing_stage_ends_the_others_and_shows_its_log(tmp_path: Path, behaviour: dict[str, Any]) -> None:
    config, run = fake_config(), tmp_path / "run"
    failing = behaviour | {"fail": {"warmup-target": 7}, "seconds": 0.3}
    with pytest.raises(
        StageError, match=r"(?s)warmup-target failed with exit code 7.*warmup-target\.log.*it went wrong"
    ):
        local.run(config, run, command=fake_command(failing))
    records = state.read_state(run)
    assert records["warmup-target"].status == "failed"
    assert "it went wrong" in records["warmup-target"].error
    assert "running" not in {record.status for record in records.values()}
    assert not processes_of(run)
    local.run(config, run, command=fake_command(behaviour))
    assert {record.status for record in state.read_state(run).values()} == {"done"}


def test_a_stage_that_refuses_its_input_gives_exit_code_2_and_one_sentence(
    tmp_path: Path, behaviour: dict[str, Any]
) -> None:
    process = drive(fake_config(), tmp_path / "run", behaviour | {"fail": {"inventory": 2}})
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert errors.startswith("error: inventory: data.pool is of cheese; make it of text (log: ")
    assert "Traceback" not in errors


def test_a_stage_without_its_outputs_has_failed(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"ended without .*inventory\.json"):
        local.run(fake_config(), tmp_path / "run", command=lambda stage: [sys.executable, "-c", "pass"])


def test_killed_launchers_leave_nothing_behind_and_the_next_one_goes_on(
    tmp_path: Path, behaviour: dict[str, Any]
) -> None:
    config, run = fake_config(), tmp_path / "run"
    slow = behaviour | {"seconds": 0.4}
    done: dict[str, int] = {}

    def starts(name: str) -> int:
        return [entry[:2] for entry in journal(tmp_path / "journal")].count(("begin", name))

    for stage in ("warmup-target", "round-0001/score", "round-0002/bilevel"):
        process = drive(config, run, slow)
        wait_for(lambda name=stage: ("begin", name) in [entry[:2] for entry in journal(tmp_path / "journal")])  # type: ignore[misc]
        time.sleep(0.1)
        process.kill()
        process.communicate()
        wait_for(lambda: not processes_of(run), seconds=10)
        done |= {name: starts(name) for name, record in state.read_state(run).items() if record.status == "done"}
    process = drive(config, run, behaviour)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    noted = journal(tmp_path / "journal")
    ended = {name for event, name, *_ in noted if event == "end"}
    assert ended == {stage.name for stage in plan(config, run)}
    # only a stage whose end the killed launcher had not noted yet may have been run again
    assert {name: starts(name) for name in done} == done
    assert len([1 for event, *_ in noted if event == "begin"]) >= len(ended) + 3


def test_leftovers_of_a_killed_run_are_ended_first(tmp_path: Path, behaviour: dict[str, Any]) -> None:
    run = tmp_path / "run"
    leftover = subprocess.Popen(["sleep", "60"], env=os.environ | {RUN_VARIABLE: str(run)})
    # a process that is just being started has no environment to be seen yet
    wait_for(lambda: RUN_VARIABLE in psutil.Process(leftover.pid).environ())
    local.run(fake_config(rounds=1, controls=[]), run, command=fake_command(behaviour))
    assert not psutil.pid_exists(leftover.pid)


def test_ranks_end_with_a_killed_launcher(tmp_path: Path, behaviour: dict[str, Any]) -> None:
    run = tmp_path / "run"
    process = drive(fake_config(), run, behaviour | {"seconds": 60, "torchrun": ["inventory"]})
    wait_for(lambda: len(journal(tmp_path / "journal")) == 2, seconds=90)
    ranks = [pid for _, _, pid in journal(tmp_path / "journal")]
    assert set(ranks) <= set(processes_of(run))
    process.kill()
    process.communicate()
    wait_for(lambda: not processes_of(run), seconds=15)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_ends_the_stages_and_says_so(
    tmp_path: Path, behaviour: dict[str, Any], number: signal.Signals
) -> None:
    run = tmp_path / "run"
    process = drive(fake_config(), run, behaviour | {"seconds": 30})
    wait_for(lambda: bool(journal(tmp_path / "journal")))
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 3
    assert errors.strip() == f"stopped by {number.name}; run again to go on"
    assert not processes_of(run)
    record = state.read_state(run)["inventory"]
    assert record.status == "pending"
    assert number.name in record.note


def test_stages_that_listen_come_to_an_end_of_their_own(tmp_path: Path, behaviour: dict[str, Any]) -> None:
    config, run = fake_config(launch=LaunchConfig(concurrency=4)), tmp_path / "run"
    process = drive(config, run, behaviour | {"listens": ["warmup-target", "warmup-proxy"]})
    wait_for(lambda: {"warmup-target", "warmup-proxy"} <= {name for _, name, _ in journal(tmp_path / "journal")})
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 3
    noted = [entry[:2] for entry in journal(tmp_path / "journal")]
    assert {("stop", "warmup-target"), ("stop", "warmup-proxy")} <= set(noted)
    assert state.read_state(run)["warmup-proxy"].status == "pending"
    again = drive(config, run, behaviour)
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors


def test_one_that_does_not_come_to_an_end_is_killed(tmp_path: Path, behaviour: dict[str, Any]) -> None:
    hangs = [sys.executable, "-S", "-c", "import signal, time; signal.signal(15, print); time.sleep(99)"]
    config, run = fake_config(launch=LaunchConfig(stop_minutes=0.005)), tmp_path / "run"
    failing = fake_command(behaviour | {"fail": {"warmup-prepare": 7}, "seconds": 0.5})

    def command(stage: Stage) -> list[str]:
        return hangs if stage.name == "warmup-proxy" else failing(stage)

    with pytest.raises(StageError, match="warmup-prepare failed"):
        local.run(config, run, command=command)
    assert not processes_of(run)


def test_a_stage_that_hangs_is_ended_and_says_so(tmp_path: Path, behaviour: dict[str, Any]) -> None:
    config, run = fake_config(launch=LaunchConfig(hang_minutes=0.02)), tmp_path / "run"
    with pytest.raises(StageError, match=r"inventory gave no sign of life for 0\.02 minutes and was ended"):
        local.run(config, run, command=fake_command(behaviour | {"seconds": 60}))
    record = state.read_state(run)["inventory"]
    assert record.status == "failed"
    assert record.error.splitlines()[-1].startswith("it gave no sign of life for 0.02 minutes")
    assert not processes_of(run)


def test_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line in the log, or a file in an output; a directory that is not there yet is awaited in the one above."""
    now, log, output = [1000.0], tmp_path / "log", tmp_path / "target" / "iter_0000010"
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    output.parent.mkdir()
    heartbeat, never = Heartbeat(log, [output], minutes=1), Heartbeat(log, [output], minutes=0)

    def silent_after(seconds: float) -> bool:
        now[0] += seconds
        return heartbeat.is_silent()

    assert not silent_after(10)  # the first look at the outputs
    assert not silent_after(55)
    log.write_text("a line")
    assert not silent_after(10)
    assert not silent_after(55)
    (output.parent / "shard").write_text("x")
    os.utime(output.parent / "shard", ns=(1, time.time_ns() + 10**9))
    assert not silent_after(10)
    assert not silent_after(55)
    assert silent_after(10)
    assert not never.is_silent()


def test_a_stage_that_stopped_unasked_is_called_again(tmp_path: Path, behaviour: dict[str, Any]) -> None:
    config, run = fake_config(rounds=1, controls=[]), tmp_path / "run"
    local.run(config, run, command=fake_command(behaviour | {"stops": {"warmup-target": 2}}))
    assert state.read_state(run)["warmup-target"].attempts == 3


def test_one_that_never_comes_further_ends_the_run(tmp_path: Path, behaviour: dict[str, Any]) -> None:
    """Each attempt at it comes to 5 of 10 steps, so all after the first are in vain."""
    config, run = fake_config(launch=LaunchConfig(max_attempts=2)), tmp_path / "run"
    with pytest.raises(
        StageError, match=r"inventory stopped before its end; 2 attempts in a row came no further than 5"
    ):
        local.run(config, run, command=fake_command(behaviour | {"stops": {"inventory": 9}}))
    record = state.read_state(run)["inventory"]
    assert (record.status, record.attempts) == ("failed", 3)
    assert "2 attempts in a row came no further than 5" in record.error.splitlines()[-1]


def test_two_launchers_do_not_share_a_run(tmp_path: Path, behaviour: dict[str, Any]) -> None:
    run = tmp_path / "run"
    process = drive(fake_config(), run, behaviour | {"seconds": 30})
    try:
        wait_for(lambda: bool(journal(tmp_path / "journal")))
        with pytest.raises(UserError, match=f"in use by process {process.pid}"):
            local.run(fake_config(), run, command=fake_command(behaviour))
    finally:
        process.terminate()
        process.communicate(timeout=20)


def test_the_longest_chain_is_started_first(tmp_path: Path) -> None:
    stages = plan(fake_config(), tmp_path)
    order = [stage.name for stage in by_urgency(stages)]
    assert sorted(order) == sorted(stage.name for stage in stages)
    assert order.index("round-0002/bilevel") < order.index("round-0001/evaluate")
    for stage in stages:
        assert all(order.index(name) < order.index(stage.name) for name in stage.needs)


def surroundings(num_ranks: int, tensor_parallel: int = 1, **launch: int) -> dict[str, str]:
    config = fake_config(launch=LaunchConfig(**launch), target=TargetConfig(tensor_parallel=tensor_parallel))
    stage = replace(plan(config, Path("/run"))[0], num_ranks=num_ranks)
    return local.stage_environment(config, stage, Path("/run"))


def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert surroundings(4, concurrency=2)["OMP_NUM_THREADS"] == "2"
    assert surroundings(64, concurrency=2)["OMP_NUM_THREADS"] == "1"
    assert surroundings(4, concurrency=2, nnodes=2)["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert surroundings(4, concurrency=2)["OMP_NUM_THREADS"] == "5"
    assert surroundings(4, threads=3)["OMP_NUM_THREADS"] == "3"


def test_model_parallel_ranks_start_kernels_in_order_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in surroundings(2)
    assert surroundings(2, tensor_parallel=2)["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    assert surroundings(2, tensor_parallel=2)["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


def test_stages_do_not_take_themselves_for_ranks_of_what_started_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "PET_NNODES", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RANKS_PER_NODE", "8")
    found = surroundings(1)
    assert found["RANKS_PER_NODE"] == "8"
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "PET_NNODES", "TORCHELASTIC_RUN_ID"} & found.keys()
    assert found["MEGATRON_BLISS_STOP_FILE"] == "/run/stop"


# --- logs


def test_the_sentence_of_a_refused_input_is_found_under_torchrun() -> None:
    lines = ["error: data.pool is empty; fill it", "Traceback (most recent call last):", "  exitcode  : 2 (pid: 77)"]
    assert user_error(lines, 1) == "data.pool is empty; fill it"
    assert user_error(lines[:1], 2) == "data.pool is empty; fill it"
    assert user_error([lines[0], "  exitcode  : 1 (pid: 77)"], 1) is None


def test_pace_needs_two_looks() -> None:
    pace = Pace()
    assert pace.remaining(Reading(100, 200, ""), now=10.0) is None
    assert pace.remaining(Reading(120, 200, ""), now=20.0) == pytest.approx(40.0)


def test_names_of_arms(tmp_path: Path) -> None:
    assert [arm.name for arm in arms(fake_config(), tmp_path)] == ["bliss", "random"]
