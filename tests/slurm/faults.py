"""Makes faults in runs on a real Slurm and looks whether they end as an undisturbed run does:

    python -m tests.slurm.faults [NAME…] [--net veth] [--keep DIR]

Without names all of FAULTS, one run each; the reference is `megatron-bliss run` on this machine. Equal is: every score,
every selected id and every measured loss, to the byte. Prints a table; exits with 1 if a run ended otherwise.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_bliss.artifacts import digest_file
from megatron_bliss.config import JobConfig, RunConfig, read_saved_config, save_config
from tests.slurm.bed import Cluster, slurm
from tests.slurm.chain import Chain, ranks_of_task, small_jobs
from tests.tiny_run import megatron_bliss, tiny_config

PRETRAIN = "round-0001/pretrain"
# Seconds that a node is down. Slurm drains one that comes back while its daemon, which knows nothing of it, still ends
# the job that was on it.
_DOWN = 20


def outcome(run: Path) -> dict[str, Any]:
    """What must not depend on faults, of the main arm."""
    rounds = sorted(run.glob("round-*"))
    found: dict[str, Any] = {
        str(path.relative_to(run)): digest_file(path)
        for each in rounds
        for path in (*sorted(each.glob("scores/*.npy")), *sorted(each.glob("selection/*.npy")))
    }
    results = {each.name: json.loads((each / "evaluation/results.json").read_text()) for each in rounds}
    return found | {name: (result["decay"], result["curve"]) for name, result in results.items()}


def in_pretraining(chain: Chain, steps: int = 3) -> None:
    """Wait until so many steps of the round are done."""
    chain.wait_for(lambda: chain.progress(PRETRAIN) >= steps)


def in_scoring(chain: Chain) -> None:
    """Wait until some chunks are on disk, not all."""
    chain.wait_for(lambda: len(list(chain.run_dir.glob("round-0001/scores/.unfinished-*/*.done"))) > 2, poll=0.01)


def requeue_every_stage(chain: Chain) -> str:
    """Each job is requeued once, some time after it started."""
    hit: dict[str, str] = {}
    while chain.jobs():
        for stage, numbers in chain.jobs("RUNNING").items():
            if stage not in hit and (chain.records().get(stage, {}).get("status") == "running"):
                time.sleep(2 * (len(hit) % 3))  # while it starts, or later
                if chain.bed.call("scontrol", "requeue", numbers[0]).returncode == 0:
                    hit[stage] = numbers[0]
        time.sleep(0.2)
    missed = sorted(set(chain.plan) - set(hit))
    return f"{len(hit)} of {len(chain.plan)} jobs requeued" + (f", too quick: {', '.join(missed)}" if missed else "")


def node_down(chain: Chain, node: str) -> str:
    chain.bed.call("scontrol", "update", f"nodename={node}", "state=down", "reason=fault")
    time.sleep(_DOWN)
    chain.bed.call("scontrol", "update", f"nodename={node}", "state=resume")
    return f"{node} was down for {_DOWN} s"


def node_down_in_pretraining(chain: Chain) -> str:
    in_pretraining(chain)
    return node_down(chain, "n2")


def node_down_in_scoring(chain: Chain) -> str:
    in_scoring(chain)
    return node_down(chain, "n1")


def kill_slurmd(chain: Chain) -> str:
    in_pretraining(chain)
    os.kill(int((chain.bed.directory / "run/n2.pid").read_text()), signal.SIGKILL)
    time.sleep(5)
    chain.bed.testbed("start", "n2")
    return "slurmd of n2 was dead for 5 s"


def restart_slurmctld(chain: Chain) -> str:
    in_pretraining(chain)
    os.kill(int((chain.bed.directory / "run/ctl.pid").read_text()), signal.SIGKILL)
    time.sleep(5)
    chain.bed.testbed("start", "ctl")
    return "slurmctld was dead for 5 s"


def short_limit(chain: Chain) -> str:
    chain.wait()
    attempts = chain.records()[PRETRAIN]["attempts"]
    assert attempts >= 3, f"pretraining took {attempts} jobs"
    return f"pretraining took {attempts} jobs of 2 minutes"


def preempt(chain: Chain) -> str:
    in_pretraining(chain)
    (number,) = chain.jobs()[PRETRAIN]
    chain.bed.call("scancel", "--batch", "--signal=USR2", number)
    chain.wait_for(lambda: chain.records()[PRETRAIN]["attempts"] == 2)
    log = (chain.run_dir / chain.records()[PRETRAIN]["log"]).read_text()
    assert "| stopped;" in log, "it did not stop when it was asked to"
    return "USR2: " + next(line for line in log.splitlines() if "| stopped;" in line)


def cancel_and_resubmit(chain: Chain) -> str:
    in_pretraining(chain)
    chain.cli("cancel", chain.run_dir)
    chain.wait()
    assert not chain.is_done()
    return chain.submit().splitlines()[-1].partition(": ")[2]


def fill_the_disk(chain: Chain) -> str:
    chain.wait_for(lambda: chain.records().get(PRETRAIN, {}).get("status") == "running")
    filler = chain.run_dir.parent / "filler"
    with suppress(OSError), open(filler, "wb") as stream:
        while True:
            stream.write(bytes(1 << 16))
            stream.flush()
    chain.wait()
    assert not chain.is_done()
    shown = chain.cli("status", chain.run_dir)
    filler.unlink()
    chain.submit()
    return (
        "chain ended, then submitted again: " + next(line for line in shown.splitlines() if "its log is" in line)[:60]
    )


def kill_scoring_worker(chain: Chain) -> str:
    chain.wait_for(lambda: ranks_of_task(chain.bed, 0), poll=0.5)
    ranks = ranks_of_task(chain.bed, 0)
    in_scoring(chain)
    for rank in ranks:
        rank.kill()
    return f"{len(ranks)} ranks of task 0 killed"


@dataclass(frozen=True)
class Fault:
    act: Callable[[Chain], str]  # says what it did
    begins: str = (
        "pretrain"  # stage of round 1 that it begins with, after what the reference has done; empty: with none
    )
    changes: dict[str, Any] = field(default_factory=dict)  # of `launch.slurm`
    slow_step: float = 0.5  # seconds that a step of the LLM takes longer
    disk: str = ""  # size of a file system of its own


FAULTS = {
    "none": Fault(lambda chain: "", begins="", slow_step=0),
    "requeue in every stage": Fault(requeue_every_stage, begins=""),
    "node down in pretraining": Fault(node_down_in_pretraining),
    "node down in scoring": Fault(node_down_in_scoring, begins="score"),
    "slurmd killed": Fault(kill_slurmd),
    "slurmctld killed": Fault(restart_slurmctld),
    "short time limit": Fault(
        short_limit, changes={"pretrain": JobConfig(nodes=[2], gpus=1, time="2"), "stop_margin": 60}, slow_step=6
    ),
    "pre-empted (USR2)": Fault(preempt),
    "scancel, resubmit": Fault(cancel_and_resubmit),
    "disk full": Fault(fill_the_disk, disk="60m"),
    "scoring worker killed": Fault(kill_scoring_worker, begins="score"),
}


def settings(folder: Path) -> RunConfig:
    """Of the reference: two ranks in every stage, and scoring in many small chunks."""
    config = read_saved_config(tiny_config(folder, control=False, rounds=1))
    target = replace(config.target, script=str(Path(__file__).parents[1] / "scripts" / "slow_gpt.py"))
    scoring = replace(config.scoring, chunk_sequences=4, batch_tokens=64)
    launch = replace(config.launch, nproc_per_node=2, concurrency=1)
    return replace(config, round_steps=18, target=target, scoring=scoring, launch=launch)


def submitted_settings(config: RunConfig, fault: Fault) -> RunConfig:
    jobs = {kind: JobConfig(nodes=[1], gpus=2, time="60") for kind in ("side", "score", "evaluate")}
    jobs["score"].tasks = 2
    return replace(config, launch=small_jobs(**(jobs | fault.changes)))


def begin_with(stage: str, reference: Path, run: Path) -> None:
    """Make `run` what the reference was before a stage of round 1."""
    shutil.copytree(reference, run, dirs_exist_ok=True)
    left = ["round-0001/evaluation", "round-0001/pretrain", "target", "target-selections.json", "report.html"]
    undone = ["round-0001/pretrain", "round-0001/evaluate", "report"]
    if stage == "score":
        left += ["round-0001/scores", "round-0001/selection", "round-0001/indices.json"]
        undone += ["round-0001/score", "round-0001/select", "round-0001/prepare"]
    for name in left:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    state = json.loads((run / "state.json").read_text())
    state["stages"] = {name: record for name, record in state["stages"].items() if name not in undone}
    (run / "state.json").write_text(json.dumps(state))


@contextmanager
def own_disk(folder: Path, size: str) -> Iterator[None]:
    """:param size: of a file system for a folder; empty for none."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if not size:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def try_fault(name: str, bed: Cluster, folder: Path, config: RunConfig, reference: Path) -> tuple[bool, str]:
    """Whether the run ended as the reference, and what was done to it."""
    fault = FAULTS[name]
    if fault.begins:
        begin_with(fault.begins, reference, folder / "run")
    chain = Chain(bed, folder, submitted_settings(config, fault), SLOW_STEP=str(fault.slow_step))
    try:
        chain.submit()
        done = fault.act(chain)
        chain.wait()
        if not chain.is_done():
            return False, f"{done}; the chain ended early:\n{chain.cli('status', chain.run_dir)}"
        return outcome(chain.run_dir) == outcome(reference), done
    except AssertionError as error:
        return False, str(error)
    finally:
        with suppress(AssertionError):
            chain.cli("cancel", chain.run_dir)


def run_faults(names: list[str], net: str, folder: Path) -> bool:
    reference, path = folder / "reference", folder / "reference.yaml"
    if not path.exists():  # a second call with --keep has it
        (folder / "data").mkdir(parents=True)
        save_config(settings(folder / "data"), path)
    config = read_saved_config(path)
    began = time.monotonic()
    done = megatron_bliss("run", path, "--run", reference, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"reference: {time.monotonic() - began:.0f} s", flush=True)
    good = True
    folders = {name: folder / name.replace(" ", "-") for name in names}
    with ExitStack() as stack:
        for name in names:  # before there is a Slurm, whose nodes do not see what is mounted later
            stack.enter_context(own_disk(folders[name], FAULTS[name].disk))
        bed = stack.enter_context(slurm(NET=net))
        for name in names:
            began = time.monotonic()
            equal, what = try_fault(name, bed, folders[name], config, reference)
            verdict = "equal" if equal else "DIFFERENT"
            print(f"{name:26} {verdict:10} {time.monotonic() - began:5.0f} s  {what}", flush=True)
            good &= equal
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FAULTS))
    parser.add_argument("--net", choices=("loopback", "veth"), default="loopback")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="directory for all files, which stays")
    given = parser.parse_args()
    if unknown := set(given.names) - set(FAULTS):
        parser.error(f"no such fault: {', '.join(unknown)}")
    names = given.names or list(FAULTS)
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        raise SystemExit(0 if run_faults(names, given.net, given.keep or Path(temporary)) else 1)


if __name__ == "__main__":
    main()
