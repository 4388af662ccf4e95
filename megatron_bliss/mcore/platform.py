"""Lets Megatron, which assumes a GPU, run on a machine without one; changes nothing where there is one.

`install()` replaces names of `torch.cuda` and the functions that make or move tensors, before Megatron builds anything.
Tensors asked for on "cuda", "cuda:N" or device N are made on the CPU. Each replacement names the Megatron code that
needs it. Only creation and moves pass through a wrapper, so a training step costs what it costs in plain PyTorch, and
backward's own threads are covered.
"""

import functools
import os
import queue
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_bliss.errors import UserError
from megatron_bliss.mcore.kernels import Kernels, available_kernels

_CPU = torch.device("cpu")
_NVIDIA_DEVICE = Path("/dev/nvidia0")  # there with the kernel's part of the driver

# Flags of Megatron's scripts for which the default needs CUDA, Transformer Engine or Apex: all of them.
_CPU_FLAGS: tuple[tuple[str, ...], ...] = (
    ("--distributed-backend", "gloo"),
    ("--transformer-impl", "local"),
    ("--use-cpu-initialization",),
    ("--num-workers", "0"),
    ("--no-masked-softmax-fusion",),
    ("--no-bias-dropout-fusion",),
    ("--no-bias-gelu-fusion",),
    ("--no-gradient-accumulation-fusion",),
    ("--no-persist-layer-norm",),
    ("--no-rope-fusion",),
)

_FACTORIES = (
    *("tensor", "as_tensor", "empty", "empty_strided", "zeros", "ones", "full", "eye", "arange", "linspace"),
    *("rand", "randn", "randint", "randperm", "empty_like", "zeros_like", "ones_like", "full_like"),
    *("rand_like", "randn_like", "randint_like"),
)
_NEW_TENSORS = ("new_tensor", "new_empty", "new_zeros", "new_ones", "new_full")


def device() -> torch.device:
    """Where this rank's tensors live: its current GPU, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU


def backend() -> str:
    """The `torch.distributed` backend for `device()`."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def training_flags(given: Iterable[str] = ()) -> list[str]:
    """Flags that Megatron's training scripts need on this machine; none on a GPU with Transformer Engine and Apex.

    :param given: the script's arguments so far; a flag that is already among them is left out, so that the user's
        own value holds.
    :raises UserError: for sequence parallelism without a norm that knows it.
    """
    kernels, names = available_kernels(), {word.split("=")[0] for word in given}
    if "--sequence-parallel" in names and not (kernels.transformer_engine or kernels.apex_norm):
        raise UserError(
            "--sequence-parallel (target.sequence_parallel) needs Transformer Engine or Apex, which are not here: "
            "Megatron's torch norms refuse it; install one of them or leave it out"
        )
    flags = _gpu_flags(kernels) if torch.cuda.is_available() else _CPU_FLAGS
    return [word for flag in flags if flag[0] not in names for word in flag]


def _gpu_flags(kernels: Kernels) -> list[tuple[str, ...]]:
    """In place of defaults for which a package is missing."""
    flags: list[tuple[str, ...]] = []
    if not kernels.transformer_engine:
        flags += [("--transformer-impl", "local"), ("--no-rope-fusion",)]
        if not kernels.fused_softmax:
            flags.append(("--no-masked-softmax-fusion",))
        if not kernels.apex_norm:
            flags.append(("--no-persist-layer-norm",))
    if not kernels.fused_weight_gradient:
        flags.append(("--no-gradient-accumulation-fusion",))
    return flags


def environment() -> dict[str, str]:
    """Variables that Megatron needs on this machine; to be set before `megatron` is imported."""
    if torch.cuda.is_available():
        return {}
    return {
        "TORCHDYNAMO_DISABLE": "1",  # core/jit.py compiles its fusions: minutes on a CPU, for nothing
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # arguments.py demands it for tensor parallelism
    }


def install() -> None:
    """Make the replacements, once; does nothing where a GPU is present. Call it before Megatron builds a model.

    :raises UserError: if there is a GPU that torch cannot use, and nobody asked for the CPU.
    """
    if torch.cuda.is_available() or _is_installed():
        return
    if _NVIDIA_DEVICE.exists() and os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() not in ("", "-1"):
        raise UserError(
            f"{_NVIDIA_DEVICE} is here, but torch {torch.__version__} finds no GPU: mend the driver or install a torch "
            "built for it; to run on the CPU set CUDA_VISIBLE_DEVICES=-1"
        )
    if os.environ.get("RANK", "0") == "0":
        print("no GPU found: running on the CPU with gloo", flush=True)
    for name, value in environment().items():
        os.environ.setdefault(name, value)
    _replace_cuda_module()
    _replace_tensor_functions()
    _replace_megatron_checks()


def _is_installed() -> bool:
    return torch.cuda.Stream is _NoStream


class _NoStream:
    """Stands in for torch.cuda.Stream and torch.cuda.Event: work on a CPU is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_NoStream":
        return self

    def __exit__(self, *exception: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _replace_cuda_module() -> None:
    cuda: Any = torch.cuda
    # training/initialize.py picks the local device; tensor_parallel/layers.py and mappings.py ask for the current one
    cuda.current_device = lambda: 0
    cuda.device_count = lambda: 1
    # training/training.py, distributed_data_parallel.py and the timers wait for the device and free its memory
    for name in ("synchronize", "empty_cache", "set_device", "set_stream", "reset_peak_memory_stats", "manual_seed"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    # training_log reports memory
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.memory_stats = lambda *args, **kwargs: {}
    # arguments.py and utils/common_utils.py decide by architecture; param_and_grad_buffer.py by properties
    cuda.get_device_capability = lambda *args, **kwargs: (8, 0)
    cuda.get_device_properties = lambda *args, **kwargs: types.SimpleNamespace(
        name="cpu", major=8, minor=0, multi_processor_count=1, total_memory=1 << 34
    )
    # gradient reduction, pipeline communication and checkpointing order their work by streams and events
    cuda.Stream = cuda.Event = _NoStream
    cuda.stream = lambda stream: _NoStream()
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _NoStream()
    # optimizer and clip_grads.py test tensors against torch.cuda.FloatTensor and its like
    for name in ("Float", "Half", "BFloat16", "Double", "Int", "Long", "Byte"):
        setattr(cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    # tensor_parallel/random.py forks the generator of the GPU around dropout and initialisation
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _is_gpu(place: Any) -> bool:
    if isinstance(place, torch.device):
        return place.type == "cuda"
    if isinstance(place, str):
        return place.startswith("cuda")
    return isinstance(place, int) and not isinstance(place, bool)


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with the CPU in place of any GPU in its `device` argument."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _is_gpu(kwargs["device"]):
            kwargs["device"] = _CPU
        return function(*args, **kwargs)

    return wrapper


def _replace_tensor_functions() -> None:
    tensor: Any = torch.Tensor
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _NEW_TENSORS:
        setattr(tensor, name, _on_cpu(getattr(tensor, name)))

    # batches, checkpoints and models are moved with .cuda() and .to()
    tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    tensor.to = _moved_to_cpu(tensor.to)
    torch.nn.Module.to = _moved_to_cpu(torch.nn.Module.to)  # type: ignore[method-assign]

    # the optimizers sort parameters by type() and know the names of GPU types only
    type_of = tensor.type

    @functools.wraps(type_of)
    def gpu_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_of(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.") if isinstance(answer, str) else answer

    tensor.type = gpu_type


def _moved_to_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and _is_gpu(args[0]):
            args = (_CPU, *args[1:])
        if "device" in kwargs and _is_gpu(kwargs["device"]):
            kwargs["device"] = _CPU
        return function(self, *args, **kwargs)

    return wrapper


def _replace_megatron_checks() -> None:
    if "torch._dynamo" in sys.modules:  # imported before environment() was set
        sys.modules["torch._dynamo"].config.disable = True
    import megatron
    import megatron.core.datasets as datasets
    import megatron.core.datasets.utils as dataset_utils
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # initialize.py compiles dataset helpers with a Makefile that only a checkout has; the wheel ships them compiled,
    # and a checkout that comes before it on the path may use those
    dataset_utils.compile_helpers = lambda: None
    datasets.__path__.extend(f"{root}/core/datasets" for root in megatron.__path__)

    import megatron.core.dist_checkpointing.strategies.filesystem_async as checkpoint_writer

    # the first save starts a process, which imports everything anew, to hold a queue that (without --async-save) this
    # process alone uses
    results: queue.Queue[Any] = queue.Queue()
    checkpoint_writer.get_write_results_queue = lambda *args, **kwargs: results

    import megatron.training.training as training

    # pretrain() demands CUDA unless this is said
    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    megatron.training.initialize_megatron = training.initialize_megatron  # what lm-eval calls
