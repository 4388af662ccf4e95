"""What a chain of jobs asks for beside what there is, and what Slurm's commands print, by hand."""

from pathlib import Path

import pytest

from megatron_bliss.config import JobConfig, LaunchConfig, SlurmConfig
from megatron_bliss.errors import UserError
from megatron_bliss.orchestration.plan import Stage
from megatron_bliss.orchestration.slurm import Request, requests
from megatron_bliss.orchestration.slurm_limits import directory_problems, file_system, limit_problems, rank_problems
from megatron_bliss.orchestration.slurm_queue import Partition, ended_states, jobs, seconds
from megatron_bliss.settings_check import METHODS
from tests.fake_run import fake_config


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("24:00:00", 86400),
        ("2-0", 172800),
        ("1-02:30", 86400 + 9000),
        ("1-00:00:01", 86401),
        ("UNLIMITED", None),
    ],
)
def test_time_limits(time: str, expected: int | None) -> None:
    assert seconds(time) == expected


def test_what_is_no_time_limit_is_refused() -> None:
    with pytest.raises(UserError, match="'a day' is not a time limit"):
        seconds("a day")


MOUNTS = """\
22 1 259:1 / / rw,relatime shared:1 - ext4 /dev/root rw
30 22 0:26 / /tmp rw,nosuid shared:12 - tmpfs tmpfs rw
31 22 0:40 / /lustre rw shared:13 - lustre 10.0.0.1@o2ib:/fs rw
32 31 0:41 / /lustre/my\\040disk rw shared:14 - xfs /dev/sdb rw
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/home/me", "ext4"), ("/tmp/x", "tmpfs"), ("/lustre/runs", "lustre"), ("/lustre/my disk/run", "xfs")],
)
def test_the_file_system_of_a_path_is_that_of_the_innermost_mount(path: str, expected: str) -> None:
    assert file_system(Path(path), MOUNTS) == expected
    assert file_system(Path(path), "") == ""


def request(*options: str) -> Request:
    stage = Stage("round-0001/score", Path("/r"), ("score", "--run", "/r", "--round", "1"), 1, (), (), ())
    return Request(stage, ("sbatch", *options, "/launch/score.sbatch", "/r", "1"), 8)


PARTITIONS = [
    Partition("small", num_nodes=4, max_nodes=2, max_seconds=3600, is_up=True, is_default=True),
    Partition("large", num_nodes=64, max_nodes=None, max_seconds=None, is_up=True, is_default=False),
]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--nodes=2", "--time=60"), None),
        (("--nodes=3", "--time=60"), "3 nodes, and a job may have 2 in partition small"),
        (("--nodes=1", "--time=61"), "time limit 1:01:00, and partition small allows 1:00:00"),
        (("--nodes=1",), "no time limit, and partition small allows 1:00:00"),
        (("--nodes=64", "--partition=large"), None),
        (("--nodes=1", "--time=60", "--partition=huge"), "no partition 'huge'; there are small, large"),
        (("--nodes=1", "--time=60", "--partition=small,large"), None),
        (("--nodes=1", "--time=60", "--array=0-99"), None),
        (("--nodes=1", "--time=60", "--array=0-100"), "101 tasks, and MaxArraySize is 100"),
        (("--nodes=3", "--time=60", "--nodes=2"), None),
    ],
)
def test_what_slurm_would_refuse_or_never_start(options: tuple[str, ...], problem: str | None) -> None:
    found = limit_problems([request(*options)], PARTITIONS, max_array_size=100)
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


def test_a_command_gets_its_dependency_before_the_script() -> None:
    words = request("--array=0-7").command(("afterok:1", "afterany:2"), num_tasks=3)
    assert words[-5:] == ["--dependency=afterok:1,afterany:2", "--array=0-2", "/launch/score.sbatch", "/r", "1"]


def test_resources_by_round_reach_the_jobs(tmp_path: Path) -> None:
    pretrain = JobConfig(nodes=[4, 8, 16], gpus=4, partition="large", sbatch=["--exclusive", "--mem=0"])
    config = fake_config(
        rounds=3, controls=[], launch=LaunchConfig(slurm=SlurmConfig(pretrain=pretrain, account="llm"))
    )
    config.target.tensor_parallel = 2
    asked = {each.stage.name: each for each in requests(config, tmp_path)}
    names = ("warmup-target", *(f"round-{number:04d}/pretrain" for number in (1, 2, 3)))
    assert [asked[name].num_nodes for name in names] == [4, 8, 16, 16]
    assert asked["round-0002/pretrain"].num_ranks == 64
    words = asked["round-0002/pretrain"].words
    assert {"--account=llm", "--exclusive", "--mem=0", "CUDA_DEVICE_MAX_CONNECTIONS=1"} <= set(words)
    select = asked["round-0002/select"]
    assert (select.partition, select.num_ranks, "--account=llm" in select.words) == (None, 1, True)


def test_ranks_that_cannot_share_a_batch_are_refused_before_anything_is_submitted(tmp_path: Path) -> None:
    jobs = {"side": JobConfig(gpus=8), "evaluate": JobConfig(gpus=8)}

    def problems(nodes: int) -> list[str]:
        slurm = SlurmConfig(pretrain=JobConfig(nodes=[nodes], gpus=8), **jobs)
        config = fake_config(controls=[], launch=LaunchConfig(slurm=slurm))
        return rank_problems(config, tmp_path, requests(config, tmp_path))

    assert problems(8) == []  # 512 sequences, 8 a micro-batch
    assert problems(3) == [
        "target.global_batch_size is 512; it must be a multiple of 192, target.micro_batch_size × data-parallel ranks"
    ]


def test_a_directory_of_this_host_alone_is_refused(tmp_path: Path) -> None:
    (problem,) = directory_problems(fake_config(), Path("/tmp/run"))
    assert "/tmp/run is under /tmp, which other nodes do not see; give a directory on a shared file system" in problem
    assert not directory_problems(fake_config(launch=LaunchConfig(slurm=SlurmConfig(is_shared=True))), Path("/tmp/run"))


@pytest.mark.parametrize("method", METHODS)
def test_every_stage_has_a_script_and_resources_of_its_kind(method: str, tmp_path: Path) -> None:
    jobs = {kind: JobConfig(partition=kind) for kind in ("cpu", "side", "score", "pretrain", "evaluate")}
    launch = LaunchConfig(nproc_per_node=2, slurm=SlurmConfig(**jobs))
    config = fake_config(rounds=1, controls=[], method=method, launch=launch)
    config.bilevel.kl_source = "cached"
    for asked in requests(config, tmp_path):
        is_distributed = asked.stage.num_ranks > 1
        assert (asked.partition != "cpu") == is_distributed, asked.stage.name
        script = next(word for word in asked.words if word.endswith(".sbatch"))
        assert ("run_on_all_nodes" in Path(script).read_text()) == is_distributed, script


def test_a_machine_without_slurm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="squeue is not on this machine; call this where jobs are submitted"):
        jobs(tmp_path / "run")
    assert ended_states(["12"]) == {}
