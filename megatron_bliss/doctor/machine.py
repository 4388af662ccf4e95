"""What is installed and what hardware there is: `look` reads it, the other functions judge it and read nothing."""

import importlib
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import psutil
import torch

from megatron_bliss.config import RunConfig
from megatron_bliss.doctor.findings import Finding, Status
from megatron_bliss.wording import counted

PACKAGES = ("megatron-bliss", "torch", "megatron-core", "numpy", "sentencepiece", "tokenizers", "omegaconf")
_MODULES = {  # optional modules, by what they are called
    "Transformer Engine": "transformer_engine.pytorch",
    "Apex": "apex.normalization.fused_layer_norm",
    "Apex weight gradient": "fused_weight_gradient_mlp_cuda",
}
_OPTIONAL = {  # packages: what is missing without them, and how they are had
    "wandb": ("tracking.wandb cannot be switched on", "pip install wandb"),
    "tensorboard": ("tracking cannot be switched on", 'pip install "megatron-bliss[tracking]"'),
    "lm-eval": ("no downstream tasks (`megatron-bliss benchmark`)", 'pip install "megatron-bliss[eval]"'),
}
_GET_ENGINE = 'pip install "megatron-bliss[te]"'
_PATIENCE = 10  # seconds for Slurm's controller
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
_MIN_SHARED_MEMORY = 1 << 30  # bytes; containers start with 64 MB
_BF16_CAPABILITY = (8, 0)
# Mappings of a shard in a training process: index and tokens in Megatron and here, its three index files, the kept ids.
_MAPS_PER_SHARD = 10
_MAPS_OF_LIBRARIES = 5000


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int  # bytes
    capability: tuple[int, int]


@dataclass(frozen=True)
class Slurm:
    version: str
    answers: bool  # whether a controller does


@dataclass(frozen=True)
class Machine:
    """Facts about this machine."""

    python: str
    versions: dict[str, str | None]  # of PACKAGES and optional ones; None: not installed
    gpus: tuple[Gpu, ...] = ()
    has_nvidia_device: bool = False  # the driver's device file is there, usable or not
    hides_gpus: bool = False  # CUDA_VISIBLE_DEVICES asks for the CPU
    torch_cuda: str | None = None  # version that torch was built for
    nccl: str | None = None
    import_errors: dict[str, str | None] = field(default_factory=dict)  # of _MODULES; None: it can be imported
    slurm: Slurm | None = None
    cores: int = 1
    memory: int = 0  # bytes
    shared_memory: int | None = None  # bytes of /dev/shm
    max_map_count: int | None = None


def look() -> Machine:
    """Read the facts; imports optional packages, and asks Slurm's controller if there is one."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    properties = [torch.cuda.get_device_properties(index) for index in devices]
    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return Machine(
        python=platform.python_version(),
        versions={name: _version(name) for name in (*PACKAGES, *_OPTIONAL)},
        gpus=tuple(Gpu(each.name, each.total_memory, (each.major, each.minor)) for each in properties),
        has_nvidia_device=Path("/dev/nvidia0").exists(),
        hides_gpus=os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1"),
        torch_cuda=torch.version.cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None,
        import_errors={name: _import_error(module) for name, module in _MODULES.items()},
        slurm=_slurm(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=psutil.virtual_memory().total,
        shared_memory=shutil.disk_usage(_SHARED_MEMORY).total if _SHARED_MEMORY.is_dir() else None,
        max_map_count=_number(Path("/proc/sys/vm/max_map_count")),
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a package built for another CUDA fails in many ways
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def _slurm() -> Slurm | None:
    if shutil.which("sinfo") is None:
        return None
    version = _answer("sinfo", "--version").strip().removeprefix("slurm-wlm ").removeprefix("slurm ")
    return Slurm(version or "installed", " UP" in _answer("scontrol", "ping"))


def _answer(*command: str) -> str:
    """What a command prints; nothing if it fails or takes too long."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def check_machine(machine: Machine, config: RunConfig | None) -> list[Finding]:
    """:param config: what is to run here, if anything."""
    return [
        *check_versions(machine),
        *check_gpus(machine, config),
        *check_kernels(machine, config),
        check_slurm(machine),
        *check_memory(machine),
        check_maps(machine, config),
    ]


def check_versions(machine: Machine) -> list[Finding]:
    findings = [Finding("python", "ok", machine.python)]
    for name, version in machine.versions.items():
        if version is None and name in _OPTIONAL:
            findings.append(Finding(name, "gap", "not installed", *_OPTIONAL[name]))
        elif version is None:
            findings.append(Finding(name, "broken", "not installed", "nothing runs", f"pip install {name}"))
        else:
            findings.append(Finding(name, "ok", version))
    return findings


def check_gpus(machine: Machine, config: RunConfig | None) -> list[Finding]:
    """GPUs and NCCL, and whether there are as many as a stage has ranks."""
    if not machine.gpus:
        return _without_gpus(machine, config)
    names = sorted({f"{gpu.name}, {gpu.memory / 2**30:.0f} GiB" for gpu in machine.gpus})
    found = [Finding("GPUs", "ok", f"{len(machine.gpus)} × {'; '.join(names)} (CUDA {machine.torch_cuda})")]
    ranks = config.launch.nproc_per_node if config else 1
    if ranks > len(machine.gpus):
        found.append(
            Finding(
                "ranks", "broken", f"launch.nproc_per_node is {ranks}, and there are {len(machine.gpus)} GPUs",
                "ranks of a stage have no GPU to run on", f"launch.nproc_per_node={len(machine.gpus)}",
            )
        )  # fmt: skip
    models = (config.target.model, config.proxy.model) if config else ()
    if any(model.bf16 for model in models) and min(gpu.capability for gpu in machine.gpus) < _BF16_CAPABILITY:
        found.append(
            Finding(
                "bfloat16", "gap", "a GPU before compute capability 8.0", "bfloat16 is emulated and slow",
                "target.model.bf16=false proxy.model.bf16=false",
            )
        )  # fmt: skip
    if machine.nccl is not None:
        return [*found, Finding("NCCL", "ok", machine.nccl)]
    status: Status = "broken" if ranks > 1 else "gap"
    return [
        *found,
        Finding(
            "NCCL", status, "torch was built without it", "only one GPU can be used", "pip install torch, for CUDA"
        ),
    ]


def _without_gpus(machine: Machine, config: RunConfig | None) -> list[Finding]:
    if machine.has_nvidia_device and not machine.hides_gpus:
        return [
            Finding(
                "GPUs", "broken", f"/dev/nvidia0 is here, but torch (CUDA {machine.torch_cuda}) finds no GPU",
                "stages refuse to start rather than run on the CPU unasked",
                "mend the driver, or install a torch built for it; CUDA_VISIBLE_DEVICES=-1 to run on the CPU",
            )
        ]  # fmt: skip
    found = [
        Finding(
            "GPUs", "gap", f"none; {machine.cores} CPU cores with gloo",
            "hundreds of times slower: good for tests and the demo, not for an LLM", "run on a node with GPUs",
        )
    ]  # fmt: skip
    if config and config.launch.nproc_per_node * config.launch.concurrency > machine.cores:
        found.append(
            Finding(
                "ranks", "gap",
                f"{counted(config.launch.nproc_per_node, 'rank')} × {counted(config.launch.concurrency, 'stage')} on "
                f"{counted(machine.cores, 'core')}",
                "ranks take turns on the cores", "lower launch.nproc_per_node or launch.concurrency",
            )
        )  # fmt: skip
    return found


def check_kernels(machine: Machine, config: RunConfig | None) -> list[Finding]:
    """Transformer Engine and Apex: gaps where a GPU could use them, unless the LLM's layout needs them."""
    engine, apex, gradient = (machine.import_errors.get(name, "not installed") for name in _MODULES)
    if not machine.gpus:
        unused = "not used without a GPU"
        found = [Finding("Transformer Engine", "ok", unused), Finding("Apex", "ok", unused)]
    elif engine is None:
        found = [Finding("Transformer Engine", "ok", "layers, norms and attention"), _apex(apex, gradient, "")]
    else:
        costs = "no fused layers and no fp8: the LLM trains slower"
        found = [Finding("Transformer Engine", "gap", engine, costs, _GET_ENGINE), _apex(apex, gradient, ", norms too")]
    if config and config.target.context_parallel > 1 and not (machine.gpus and engine is None):
        value = f"target.context_parallel is {config.target.context_parallel}, without Transformer Engine on a GPU"
        costs = "Megatron's own attention cannot split a sequence over ranks"
        found.append(Finding("context parallelism", "broken", value, costs, "target.context_parallel=1"))
    return found


def _apex(norm: str | None, gradient: str | None, also: str) -> Finding:
    """:param norm: why its norm cannot be imported; None: it can.
    :param also: what else is done without fused kernels.
    """
    if norm is None and gradient is None:
        return Finding("Apex", "ok", "fused norms and weight gradients")
    costs = f"weight gradients are added up in a step of their own{also}: slower"
    build = "build it from source with --cpp_ext --cuda_ext, or use NVIDIA's PyTorch container"
    return Finding("Apex", "gap", norm or str(gradient), costs, build)


def check_slurm(machine: Machine) -> Finding:
    if machine.slurm is None:
        costs = "stages run on this machine only (`megatron-bliss run`)"
        return Finding("Slurm", "gap", "no sinfo on PATH", costs, "log in to the cluster's login node")
    if not machine.slurm.answers:
        value = f"{machine.slurm.version}, but no controller answers"
        return Finding("Slurm", "gap", value, "no job can be submitted from here", "scontrol ping")
    return Finding("Slurm", "ok", f"{machine.slurm.version}, controller answers")


def check_memory(machine: Machine) -> list[Finding]:
    found = [Finding("memory", "ok", f"{machine.memory / 2**30:.0f} GiB, {machine.cores} cores")]
    shared = machine.shared_memory
    if machine.gpus and shared is not None and shared < _MIN_SHARED_MEMORY:
        value = f"{_SHARED_MEMORY} has {shared / 2**20:.0f} MiB"
        costs = "NCCL and the data loader's workers may stop with a bus error"
        found.append(Finding("shared memory", "gap", value, costs, "start the container with --ipc=host"))
    return found


def check_maps(machine: Machine, config: RunConfig | None) -> Finding:
    """The limit on memory mappings, against those of the pool's shards."""
    limit = machine.max_map_count
    if limit is None:
        return Finding("mmap limit", "ok", "none known of")
    shards = sum(len(domain.prefixes) for domain in config.data.pool) if config else 0
    needed = _MAPS_OF_LIBRARIES + _MAPS_PER_SHARD * shards
    if needed <= limit:
        room = (limit - _MAPS_OF_LIBRARIES) // _MAPS_PER_SHARD
        return Finding("mmap limit", "ok", f"vm.max_map_count is {limit}: enough for {room} shards")
    return Finding(
        "mmap limit", "broken", f"vm.max_map_count is {limit}; {shards} shards need some {needed}",
        "the training ends with 'Cannot allocate memory' while it opens its data",
        f"sudo sysctl -w vm.max_map_count={2 * needed}",
    )  # fmt: skip
