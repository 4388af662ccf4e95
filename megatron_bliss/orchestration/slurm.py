"""A plan as a chain of Slurm jobs: which script with which settings, after which jobs; submitted, topped up, cancelled.

Nothing of it stays running where it is called: jobs wait for each other by Slurm's dependencies, and each notes in the
run's state what became of its stage (`slurm_job`). What was submitted is in `slurm.json`.
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

import megatron_bliss
from megatron_bliss.artifacts import RunPaths, read_json, run_lock, write_json
from megatron_bliss.config import JobConfig, RunConfig
from megatron_bliss.errors import UserError
from megatron_bliss.orchestration import slurm_queue, state
from megatron_bliss.orchestration.plan import Stage, plan
from megatron_bliss.orchestration.slurm_queue import Job
from megatron_bliss.wording import counted

# Scripts that do a stage of the warm-up as their round 0; all others are named as their stage.
_SCRIPTS = {"warmup-select": "select", "warmup-proxy": "bilevel", "warmup-target": "pretrain"}
_KINDS = {
    **dict.fromkeys(("bilevel", "influence", "fit-influence"), "side"),
    **dict.fromkeys(("evaluate", "cache-target", "fidelity"), "evaluate"),
    "score": "score",
    "pretrain": "pretrain",
}


@dataclass(frozen=True)
class Request:
    """What a stage's job will ask Slurm for."""

    stage: Stage
    words: tuple[str, ...]  # the whole command, but for what it depends on
    ranks_per_node: int

    @property
    def script(self) -> str:
        return script_of(self.stage)[0]

    @property
    def num_nodes(self) -> int:
        return int(self._option("--nodes") or 1)

    @property
    def num_tasks(self) -> int:
        """Of the array; 1 for a single job."""
        array = self._option("--array")
        return int(array.partition("-")[2]) + 1 if array else 1

    @property
    def is_array(self) -> bool:
        return self._option("--array") is not None

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def max_seconds(self) -> int | None:
        """The time limit."""
        return slurm_queue.seconds(self._option("--time") or "UNLIMITED")

    @property
    def partition(self) -> str | None:
        return self._option("--partition")

    def _option(self, name: str) -> str | None:
        """Its last value, which is the one that sbatch takes."""
        values = [word.partition("=")[2] for word in self.words if word.startswith(f"{name}=")]
        return values[-1] if values else None

    def command(self, after: tuple[str, ...], num_tasks: int | None = None) -> list[str]:
        """:param after: what `--dependency` says, such as `afterok:12`.
        :param num_tasks: of the array, if they are fewer.
        """
        further = [f"--dependency={','.join(after)}"] if after else []
        if num_tasks is not None:
            further.append(f"--array=0-{num_tasks - 1}")
        return [*self.words[: -_num_arguments(self.stage)], *further, *self.words[-_num_arguments(self.stage) :]]


def script_of(stage: Stage) -> tuple[str, list[str]]:
    """A stage's script in launch/, and its arguments."""
    command, round_number = stage.command[0], None
    if "--round" in stage.command:
        round_number = stage.command[stage.command.index("--round") + 1]
    if command in _SCRIPTS:
        command, round_number = _SCRIPTS[command], "0"
    return command, [str(stage.run_dir), *([] if round_number is None else [round_number])]


def _num_arguments(stage: Stage) -> int:
    """Words of a command that come after sbatch's options: the script and its arguments."""
    return 1 + len(script_of(stage)[1])


def requests(config: RunConfig, run_dir: Path) -> list[Request]:
    """Of all stages, as launch/submit.sh makes them of the settings.

    :raises UserError: if there are no batch scripts where they should be.
    """
    launch = _launch_dir(config)
    return [_request(config, run_dir, stage, launch) for stage in plan(config, run_dir)]


def _launch_dir(config: RunConfig) -> Path:
    given = config.launch.slurm.scripts
    directory = Path(given) if given else Path(megatron_bliss.__file__).parents[1] / "launch"
    if not (directory / "submit.sh").exists():
        raise UserError(
            f"{directory} holds no submit.sh; set launch.slurm.scripts to the launch/ directory of a checkout"
        )
    return directory.absolute()


def _request(config: RunConfig, run_dir: Path, stage: Stage, launch: Path) -> Request:
    script, arguments = script_of(stage)
    logs = RunPaths(run_dir).logs / "slurm"
    name = stage.name.replace("/", ".")
    number = "%A_%a" if script == "score" else "%j"
    options = [
        f"--job-name={name}",
        f"--comment={slurm_queue.comment(run_dir, stage.name)}",
        f"--output={logs}/{name}-{number}.log",
        "--parsable",
        "--kill-on-invalid-dep=yes",
    ]
    command = [str(launch / "submit.sh"), "--print", script, *arguments, *options]
    printed = subprocess.run(command, env=os.environ | _variables(config, script, arguments), capture_output=True)
    if printed.returncode:
        raise UserError(f"{' '.join(command)} failed: {printed.stderr.decode().strip()}")
    words = printed.stdout.decode().splitlines()
    ranks = next((word.partition("=")[2] for word in words if word.startswith("RANKS_PER_NODE=")), "1")
    return Request(stage, tuple(words), int(ranks))


def _variables(config: RunConfig, script: str, arguments: list[str]) -> dict[str, str]:
    """The settings as settings.sh takes them from its environment."""
    slurm = config.launch.slurm
    kind = _KINDS.get(script, "cpu")
    job: JobConfig = getattr(slurm, kind)
    round_number = int(arguments[1]) if len(arguments) > 1 else 0
    nodes = job.nodes[min(round_number, len(job.nodes) - 1)] if job.nodes else None
    of_kind = {
        "NODES": nodes,
        "GPUS": job.gpus,
        "CPUS": job.cpus,
        "TIME": job.time,
        "TASKS": job.tasks,
        "PARTITION": job.partition,
        "QOS": job.qos,
        "SBATCH": " ".join(job.sbatch) or None,
    }
    given: dict[str, object] = {f"{kind.upper()}_{name}": value for name, value in of_kind.items()}
    given |= {"ACCOUNT": slurm.account, "PARTITION": slurm.partition, "QOS": slurm.qos}
    given |= {"STOP_MARGIN": slurm.stop_margin, "OMP_NUM_THREADS": config.launch.threads}
    given |= {"MAX_ATTEMPTS": config.launch.max_attempts, "HANG_MINUTES": config.launch.hang_minutes}
    if config.is_model_parallel:  # before Blackwell; see settings.sh
        given["CUDA_DEVICE_MAX_CONNECTIONS"] = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return {name: str(value) for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class _Submitted:
    """What `slurm.json` knows of a stage."""

    jobs: tuple[str, ...]  # several where an array was topped up
    after: tuple[str, ...]  # what they depend on


def submitted(run_dir: Path) -> dict[str, _Submitted]:
    """By stage; empty for a run that was never submitted."""
    path = RunPaths(run_dir).slurm
    if not path.exists():
        return {}
    stages = read_json(path)["stages"]
    return {name: _Submitted(tuple(known["jobs"]), tuple(known["after"])) for name, known in stages.items()}


def submit(config: RunConfig, run_dir: Path) -> None:
    """Submit a job for every stage that is not done and has none. Called again, it leaves jobs alone that wait or run,
    replaces those that ended without their stage being done, releases those that Slurm holds since a launch failed, and
    makes an array as large as the settings say.

    :raises UserError: if the run is in use or its settings changed, or Slurm refuses a job; those before it stay.
    """
    asked, console = requests(config, run_dir), Console()
    with run_lock(RunPaths(run_dir).lock):
        queue = slurm_queue.jobs(run_dir)  # before the state: the stage of a job that ends in between is seen as done
        state.prepare(config, run_dir)
        (RunPaths(run_dir).logs / "slurm").mkdir(parents=True, exist_ok=True)
        chain = _Chain(run_dir, [job for job in queue if job.is_alive], submitted(run_dir), console)
        for request in asked:
            chain.add(request)
    console.print(
        f"{run_dir}: {counted(chain.num_new, 'job')} submitted, {chain.num_kept} left as they are, "
        f"{counted(chain.num_done, 'stage')} done",
        soft_wrap=True,
        highlight=False,
    )


class _Chain:
    """The jobs of a plan, stage by stage."""

    def __init__(self, run_dir: Path, queue: list[Job], known: dict[str, _Submitted], console: Console) -> None:
        self.num_new = self.num_kept = self.num_done = 0
        self._run_dir = run_dir
        self._queue = queue
        self._known = known
        self._console = console
        self._records = state.read_state(run_dir)
        self._awaited: dict[str, tuple[str, ...]] = {}  # by stage that is not done: what those after it depend on

    def add(self, request: Request) -> None:
        """The stage's job, after those of the stages it needs."""
        stage = request.stage
        after = tuple(word for name in stage.needs for word in self._awaited.get(name, ()))
        if not after and state.why_not_done(self._run_dir, stage, self._records.get(stage.name)) is None:
            self.num_done += 1
            return
        alive = [job for job in self._queue if job.stage == stage.name]
        known = self._known.get(stage.name)
        started = any(job.state != "PENDING" for job in alive)
        if alive and not started and not self._waits_for(known, stage, after):
            self._end(alive)
            alive = []
        if request.is_array and len(alive) > request.num_tasks:
            surplus = sorted(alive, key=lambda job: job.state == "PENDING", reverse=True)
            self._end(surplus[: len(alive) - request.num_tasks])
            alive = [job for job in alive if job not in surplus[: len(alive) - request.num_tasks]]
        if held := [job for job in alive if job.is_held]:
            self._release(held)
        jobs = {job.array for job in alive}
        if not alive:
            jobs = {self._submit(request.command(after), stage.name)}
        elif request.is_array and len(alive) < request.num_tasks:
            jobs.add(self._submit(request.command(after, request.num_tasks - len(alive)), stage.name))
        else:
            self.num_kept += 1
        # Of an array that shares its work it is enough that some end well: those after it look whether it is done.
        self._awaited[stage.name] = tuple(
            f"{'afterany' if request.is_array else 'afterok'}:{job}" for job in sorted(jobs)
        )
        self._known[stage.name] = _Submitted(tuple(sorted(jobs)), after)
        stages = {name: {"jobs": known.jobs, "after": known.after} for name, known in self._known.items()}
        write_json(RunPaths(self._run_dir).slurm, {"schema": 1, "stages": stages})

    def _waits_for(self, known: _Submitted | None, stage: Stage, after: tuple[str, ...]) -> bool:
        """Whether a job that is pending waits for all that it should, and for no job that is gone; those of stages that
        are done by now do no harm."""
        if known is None or not set(after) <= set(known.after):
            return False
        done = [self._known[name].jobs for name in stage.needs if name not in self._awaited and name in self._known]
        return {word.partition(":")[2] for word in set(known.after) - set(after)} <= {
            job for jobs in done for job in jobs
        }

    def _submit(self, words: list[str], name: str) -> str:
        number = slurm_queue.call(words).strip().partition(";")[0]  # `12` or `12;cluster`
        self.num_new += 1
        self._console.print(f"job {number}: {name}", soft_wrap=True, highlight=False)
        return number

    def _release(self, jobs: list[Job]) -> None:
        slurm_queue.call(["scontrol", "release", *(job.id for job in jobs)])
        self._console.print(
            f"released {', '.join(job.id for job in jobs)} ({jobs[0].stage}): a node had failed to start it",
            soft_wrap=True,
            highlight=False,
        )

    def _end(self, jobs: list[Job]) -> None:
        slurm_queue.call(["scancel", *(job.id for job in jobs)])
        self._console.print(
            f"ended {', '.join(job.id for job in jobs)} ({jobs[0].stage})", soft_wrap=True, highlight=False
        )


def refuse_if_queued(run_dir: Path) -> None:
    """:raises UserError: if jobs of a run wait or run, beside which its stages must not be started otherwise."""
    if not RunPaths(run_dir).slurm.exists() or not slurm_queue.is_here():
        return
    if alive := [job.id for job in slurm_queue.jobs(run_dir) if job.is_alive]:
        raise UserError(
            f"{run_dir} has jobs in Slurm's queue ({', '.join(alive)}); wait for them, or end them with "
            f"`megatron-bliss cancel {run_dir}`"
        )


def cancel(run_dir: Path) -> None:
    """End all jobs of a run, the last of the chain first.

    :raises UserError: if Slurm does not answer.
    """
    alive = [job for job in slurm_queue.jobs(run_dir) if job.is_alive]
    if alive:
        slurm_queue.call(["scancel", *sorted({job.array for job in alive}, key=int, reverse=True)])
    what = ", ".join(f"{job.id} ({job.stage})" for job in alive) or "none were waiting or running"
    Console().print(f"{run_dir}: jobs ended: {what}", soft_wrap=True, highlight=False)
