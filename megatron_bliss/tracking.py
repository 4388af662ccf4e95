"""Sends what stages measure to wandb and TensorBoard, where `tracking` asks for it; nothing leaves a run otherwise.

The LLM's training is tracked by Megatron's own writers, which are told where to write by arguments and, as wandb reads
them, environment variables. The side processes' numbers are those of their metrics.jsonl, line by line.

A stage of a round is a run of wandb, in the group of its experiment, with the command as job type. Its id is a digest
of what the experiment is, so that a stage that goes on after a kill goes on in the same run.
"""

import atexit
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_bliss.artifacts import RunPaths, digest_json, read_json
from megatron_bliss.config import GuardsConfig, LaunchConfig, RunConfig, TrackingConfig
from megatron_bliss.errors import UserError

_ID_LENGTH = 16
# wandb sends what is logged and the settings; not the console, the source code, the repository, or its own errors
_QUIET = {"WANDB_CONSOLE": "off", "WANDB_DISABLE_CODE": "true", "WANDB_DISABLE_GIT": "true"}
_QUIET |= {"WANDB_ERROR_REPORTING": "false"}


@dataclass(frozen=True)
class Job:
    """A stage of a round, as the trackers know it."""

    config: RunConfig
    paths: RunPaths
    command: str  # such as `bilevel`
    round_number: int | None = None

    @property
    def name(self) -> str:
        """Such as `round-0001/bilevel`, or `controls/random/round-0001/pretrain`."""
        above = [] if self._experiment == self.paths else ["controls", self.paths.root.name]
        rounds = [self.paths.round(self.round_number).name] if self.round_number else []
        return "/".join([*above, *rounds, self.command])

    @property
    def group(self) -> str:
        root = self._experiment.root.absolute()
        return f"{root.name}-{digest_json(str(root))[:6]}"

    @property
    def id(self) -> str:
        """The same for as long as the run lies where it is and the settings that make it stay."""
        unnamed = replace(
            self.config, guards=GuardsConfig(), launch=LaunchConfig(), tracking=TrackingConfig(), controls=[]
        )
        return digest_json([str(self.paths.root.absolute()), asdict(unnamed), self.name])[:_ID_LENGTH]

    @property
    def board(self) -> Path:
        """Directory of its TensorBoard files."""
        return self._experiment.tensorboard / self.name

    @property
    def wandb_directory(self) -> Path:
        return self._experiment.tracking

    @property
    def _experiment(self) -> RunPaths:
        """The run that a control arm belongs to; itself otherwise."""
        above = self.paths.root.parent
        return RunPaths(above.parent) if above.name == "controls" else self.paths


def check(config: TrackingConfig) -> None:
    """:raises UserError: if a package that the settings need is not installed."""
    for module, is_needed in (("wandb", config.wandb != "off"), ("tensorboard", config.is_on)):
        if is_needed and find_spec(module) is None:
            why = ", beside which alone Megatron writes to wandb," if module == "tensorboard" else ""
            raise UserError(
                f"tracking needs the package {module}{why} and it is not installed; "
                'pip install "megatron-bliss[tracking]", or set tracking.wandb=off tracking.tensorboard=false'
            )


def script_arguments(job: Job) -> list[str]:
    """For a Megatron script: where its writers write, if anywhere."""
    tracking = job.config.tracking
    if not tracking.is_on:
        return []
    words = ["--tensorboard-dir", str(job.board), "--tensorboard-log-interval", str(job.config.target.log_interval)]
    if tracking.wandb == "off":
        return words
    words += ["--wandb-project", tracking.project, "--wandb-exp-name", job.name]
    words += ["--wandb-save-dir", str(job.wandb_directory)]
    return [*words, "--wandb-entity", tracking.entity] if tracking.entity else words


def environment(job: Job) -> dict[str, str]:
    """What wandb.init() is to know beyond `script_arguments`."""
    if job.config.tracking.wandb == "off":
        return {}
    run = {"WANDB_RUN_ID": job.id, "WANDB_RUN_GROUP": job.group, "WANDB_JOB_TYPE": job.command}
    return _QUIET | run | {"WANDB_MODE": job.config.tracking.wandb, "WANDB_RESUME": "allow"}


class Tracker:
    """Open writers of a job; none of them where nothing is tracked."""

    def __init__(self, run: Any | None = None, board: Any | None = None) -> None:
        self._run, self._board = run, board

    def log(self, step: int, figures: Mapping[str, float | None]) -> None:
        """:param figures: by name; None where a number was not finite."""
        finite = {name: value for name, value in figures.items() if value is not None}
        if self._run is not None:
            self._run.log(finite, step=step)
        if self._board is not None:
            for name, value in finite.items():
                self._board.add_scalar(name, value, step)

    def log_selection(self, directory: Path, name: str) -> None:
        """A selection's manifest and a table of its domains, as an artefact of wandb."""
        if self._run is None:
            return
        import wandb

        artifact = wandb.Artifact(name.replace("/", "-"), type="selection")
        artifact.add_file(str(directory / "manifest.json"))
        domains = read_json(directory / "manifest.json")["domains"]
        columns = sorted(next(iter(domains.values())))
        rows = [[domain, *(counts[column] for column in columns)] for domain, counts in domains.items()]
        artifact.add(wandb.Table(columns=["domain", *columns], data=rows), "domains")
        self._run.log_artifact(artifact)

    def close(self) -> None:
        """May be called again."""
        if self._run is not None:
            self._run.finish()
        if self._board is not None:
            self._board.close()


def track(job: Job, is_first: bool = True, done: int = 0) -> Tracker:
    """The writers of a job of this project's own, closed when the process ends, if not before; Megatron has its own.

    :param is_first: whether this rank is the one that writes.
    :param done: steps that are done; what a killed process wrote of later ones is hidden.
    :raises UserError: if a package is missing.
    """
    tracker = _open(job, done) if is_first else Tracker()
    atexit.register(tracker.close)
    return tracker


def _open(job: Job, done: int) -> Tracker:
    tracking, run, board = job.config.tracking, None, None
    check(tracking)
    if tracking.wandb != "off":
        os.environ.update(_QUIET)
        import wandb

        job.wandb_directory.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            name=job.name,
            id=job.id,
            group=job.group,
            job_type=job.command,
            mode="offline" if tracking.wandb == "offline" else "online",
            resume="allow",
            dir=str(job.wandb_directory),
            config=asdict(job.config),
        )
    if tracking.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(job.board), purge_step=done + 1 if done else None)
    return Tracker(run, board)
