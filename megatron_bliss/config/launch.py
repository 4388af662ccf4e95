"""How stages are started."""

from dataclasses import dataclass, field


@dataclass
class JobConfig:
    """What a Slurm job of some kind of stage asks for. What is not given here is what launch/settings.sh says."""

    nodes: list[int] = field(default_factory=list)  # by round, the warm-up's first; the last for all further ones
    gpus: int | None = None  # a node; one rank each
    cpus: int | None = None  # cores a node
    time: str | None = None  # limit, as Slurm writes it: 24:00:00 or 2-00:00:00
    tasks: int | None = None  # scoring: jobs that share the work
    partition: str | None = None
    qos: str | None = None
    sbatch: list[str] = field(default_factory=list)  # further arguments of sbatch, word by word


@dataclass
class SlurmConfig:
    """What `megatron-bliss submit` asks for: account, partition and QoS of all jobs, and by kind of stage."""

    scripts: str | None = None  # directory of the batch scripts; None: launch/ beside this package
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    cpu: JobConfig = field(default_factory=JobConfig)  # inventory, select, prepare, ngrams, report
    side: JobConfig = field(default_factory=JobConfig)  # the proxy's warm-up, the bilevel loop, influence
    score: JobConfig = field(default_factory=JobConfig)
    pretrain: JobConfig = field(default_factory=JobConfig)
    evaluate: JobConfig = field(default_factory=JobConfig)  # cache-target and fidelity as well
    stop_margin: int | None = None  # seconds before the time limit at which a stage is asked to stop
    is_shared: bool = False  # all nodes see the run's directory, though its file system looks like this host's own


@dataclass
class LaunchConfig:
    """How stages are started: on this machine, and as Slurm jobs."""

    nproc_per_node: int = 1  # ranks of each stage on a machine (GPUs)
    nnodes: int = 1  # machines, of `run --launcher torchrun`
    mode: str = "alternate"  # or overlap: a round's selection is made beside the training of the round before
    concurrency: int = 1  # stages that may run side by side
    threads: int | None = None  # CPU threads a rank; None: all cores shared out evenly
    hang_minutes: float = 120.0  # without a sign of life (log, outputs) after which a stage counts as hanging; 0: never
    max_attempts: int = 3  # of a stage in a row that come no further; then the run fails
    stop_minutes: float = 10.0  # that stages get to save a checkpoint when they are to stop; then they are killed
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    @property
    def num_ranks(self) -> int:
        """Of a distributed stage, on all machines."""
        return self.nproc_per_node * self.nnodes
