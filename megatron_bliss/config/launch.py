"""How stages are started."""

from dataclasses import dataclass


@dataclass
class LaunchConfig:
    """How stages are started on this machine."""

    nproc_per_node: int = 1  # ranks of each stage (GPUs)
    concurrency: int = 1  # stages that may run side by side
    threads: int | None = None  # CPU threads a rank; None: all cores shared out evenly
