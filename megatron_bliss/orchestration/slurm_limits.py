"""Whether a chain of jobs can work here, before it is submitted: the run's file system, ranks, time limits, sizes of
arrays, disk; and the table of `submit --dry-run`."""

import re
import shlex
import shutil
import sys
from itertools import product
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_bliss.config import RunConfig
from megatron_bliss.errors import UserError
from megatron_bliss.orchestration import cost, slurm_queue
from megatron_bliss.orchestration.check import Ranks, check
from megatron_bliss.orchestration.logs import clock
from megatron_bliss.orchestration.plan import arms
from megatron_bliss.orchestration.slurm import Request, requests
from megatron_bliss.wording import counted

_LOCAL = ["tmpfs", "ramfs", "overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "squashfs"]
_LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")  # noqa: S108  # refused, not written to
_WIDTH = 140  # of the table where there is no terminal


def check_all(config: RunConfig, run_dir: Path, asked: list[Request]) -> None:
    """:raises UserError: naming all that cannot work, or that Slurm would never start."""
    problems = [*directory_problems(config, run_dir), *rank_problems(config, run_dir, asked)]
    if slurm_queue.is_here():
        problems += limit_problems(asked, slurm_queue.partitions(), slurm_queue.max_array_size())
    else:
        problems.append("sbatch is not on this machine; call this where jobs are submitted")
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))


def directory_problems(config: RunConfig, run_dir: Path) -> list[str]:
    if config.launch.slurm.is_shared:
        return []
    kind = file_system(run_dir, Path("/proc/self/mountinfo").read_text() if sys.platform == "linux" else "")
    inside = [folder for folder in _LOCAL_FOLDERS if run_dir.is_relative_to(folder)]
    if not inside and kind not in _LOCAL:
        return []
    what = f"under {inside[0]}" if inside else f"on {kind}"
    return [
        f"{run_dir} is {what}, which other nodes do not see; give a directory on a shared file system with --run, or "
        "set launch.slurm.is_shared=true if they do see it"
    ]


def file_system(path: Path, mounts: str) -> str:
    """Type of the file system that a path is on, or will be; empty if it is not known.

    :param mounts: content of /proc/self/mountinfo.
    """
    best, kind = "", ""
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), left.split()[4])  # blanks are written \040
        if path.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind


def rank_problems(config: RunConfig, run_dir: Path, asked: list[Request]) -> list[str]:
    """Layouts and batch sizes beside the ranks that each kind of stage has in each round."""
    with_target = {each.num_ranks for each in asked if each.script in ("pretrain", "evaluate")}
    with_proxy = {each.num_ranks for each in asked if each.script == "bilevel"} or {config.proxy.tensor_parallel}
    found = []
    for target, proxy in product(sorted(with_target), sorted(with_proxy)):
        names = ("nodes × GPUs of pretrain or evaluate", "nodes × GPUs of side")
        try:
            check(config, run_dir, Ranks(target, proxy, *names))
        except UserError as error:
            found.append(str(error))
    return found


def limit_problems(asked: list[Request], partitions: list[slurm_queue.Partition], max_array_size: int) -> list[str]:
    """What Slurm would refuse, or keep waiting for ever."""
    by_name = {partition.name: partition for partition in partitions}
    default = next((partition.name for partition in partitions if partition.is_default), None)
    found = []
    for request in asked:
        names = (request.partition or default or "").split(",")
        name = request.stage.name
        if unknown := [each for each in names if each not in by_name]:
            found.append(f"{name}: there is no partition {unknown[0]!r}; there are {', '.join(by_name)}")
            continue
        here = [by_name[each] for each in names]
        if request.num_tasks > max_array_size:
            found.append(
                f"{name}: {counted(request.num_tasks, 'task')}, and MaxArraySize is {max_array_size}; lower score.tasks"
            )
        most = max(min(each.num_nodes, each.max_nodes or each.num_nodes) for each in here)
        if request.num_nodes > most:
            found.append(
                f"{name}: {counted(request.num_nodes, 'node')}, and a job may have {most} in partition {here[0].name}"
            )
        longest = max(each.max_seconds or float("inf") for each in here)
        if (request.max_seconds or float("inf")) > longest:
            limit = "no time limit" if request.max_seconds is None else f"time limit {clock(request.max_seconds)}"
            found.append(f"{name}: {limit}, and partition {here[0].name} allows {clock(longest)}")
    return found


def show(config: RunConfig, run_dir: Path) -> None:
    """Print the chain, every command, and what it takes at most.

    :raises UserError: if it could not be submitted.
    """
    asked = requests(config, run_dir)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    table = Table(
        title=f"{run_dir}: {counted(len(asked), 'job')}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    for column in ("stage", "jobs", "nodes", "ranks", "time limit", "partition"):
        table.add_column(column, no_wrap=True)
    table.add_column("after", overflow="fold")
    for request in asked:
        limit = "none" if request.max_seconds is None else clock(request.max_seconds)
        sizes = (str(request.num_tasks), str(request.num_nodes), str(request.num_ranks))
        needs = ", ".join(request.stage.needs)
        table.add_row(request.stage.name, *sizes, limit, request.partition or "default", needs)
    console.print(table)
    for request in asked:
        console.print(shlex.join(request.command(())), soft_wrap=True, highlight=False)
    hours = [request.num_tasks * request.num_nodes * (request.max_seconds or 0) / 3600 for request in asked]
    console.print(
        f"\nat most {sum(hours):,.0f} node-hours if every job takes its whole time limit once", soft_wrap=True
    )
    console.print(_disk(config, run_dir), soft_wrap=True, highlight=False)
    check_all(config, run_dir, asked)


def _disk(config: RunConfig, run_dir: Path) -> str:
    pool, _ = cost.measure(config)
    needed = sum(each.disk or 0 for arm in arms(config, run_dir) for each in cost.arm_costs(arm, pool).values())
    existing = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    verdict = "" if needed < free else ": too little"
    return f"disk: {cost.quantity(needed)}B needed in all, {cost.quantity(free)}B free at {existing}{verdict}"
