"""Checkpoints in Megatron's torch_dist format and layout, readable at any tensor- and data-parallel size.

They lie as `checkpoint_files` says; models and vectors are saved with each tensor whole.

Whatever a checkpoint holds is data: pickles inside it are read with an allow-list of types (torch's `weights_only`,
and an unpickler of our own for torch_dist's table of contents), so that a checkpoint from elsewhere cannot run code.
"""

import dataclasses
import logging
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_bliss.artifacts import fsync_directory
from megatron_bliss.config import ModelConfig
from megatron_bliss.errors import UserError
from megatron_bliss.mcore.architectures import padded_vocab_size, resolve
from megatron_bliss.mcore.checkpoint_files import find, iteration_path, iterations, write_iteration
from megatron_bliss.mcore.models import build_language_model
from megatron_bliss.mcore.parallel import ParallelContext

# it recommends another package at every process's first save
logging.getLogger("megatron.core.dist_checkpointing.strategies.torch").setLevel(logging.ERROR)

MODEL = "model"  # a model of this name is saved as pretrain() would: with nothing before its parameters' names
SCORE = "score"  # what the score model is saved as, beside the proxy
Vectors = Mapping[str, Mapping[str, Sequence[Tensor]]]  # by model, by name: like the model's trainable parameters


def save(
    directory: Path,
    iteration: int,
    models: Mapping[str, torch.nn.Module],
    vectors: Vectors,
    common: dict[str, Any],
    keep: int = 2,
) -> None:
    """Save models and vectors, and leave the newest `keep` checkpoints. All ranks call it.

    :param vectors: lists of tensors shaped like the trainable parameters of the model they are filed under.
    :param common: plain numbers, strings, lists and dicts, equal on all ranks.
    """
    final, temporary = iteration_path(directory, iteration), Path(directory) / f".iter_{iteration:07d}.tmp"
    is_writer = dist.get_rank() == 0
    if is_writer:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_sharded(models, vectors) | {"common": common}, str(temporary))
    if is_writer:
        for file in temporary.iterdir():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        fsync_directory(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        write_iteration(directory, iteration)
        for old in iterations(directory)[:-keep]:
            shutil.rmtree(iteration_path(directory, old), ignore_errors=True)
    dist.barrier()


def load(directory: Path, models: Mapping[str, torch.nn.Module], vectors: Vectors) -> dict[str, Any]:
    """Load the newest checkpoint into models and vectors, in place, and return its `common`.

    :raises UserError: if there is none, or it does not fit.
    """
    path = find(directory)
    state = _read(_sharded(models, vectors), path)
    for name, model in models.items():
        _load_parameters(model, state[name], _prefix(name))
    with torch.no_grad():
        for name, by_name in vectors.items():
            for vector, tensors in by_name.items():
                for index, tensor in enumerate(tensors):
                    tensor.copy_(state[_vector_key(name, vector)][str(index)])
    return dict(state["common"])


def load_model(directory: Path, model: torch.nn.Module, name: str = MODEL, without: str | None = None) -> None:
    """Load one model out of the newest checkpoint.

    :param name: under which it was saved.
    :param without: parameters whose names begin with this keep their values.
    :raises UserError: if there is no checkpoint, or it does not fit.
    """
    sharded = model.sharded_state_dict(prefix=_prefix(name))  # type: ignore[operator]
    if without is not None:
        sharded = {key: value for key, value in sharded.items() if not key.startswith(_prefix(name) + without)}
    _load_parameters(model, _read({name: sharded}, find(directory))[name], _prefix(name))


def load_common(path: Path) -> dict[str, Any]:
    """What a checkpoint, an iter_… directory, holds beside tensors: numbers, strings, Megatron's arguments.

    :raises UserError: if it cannot be read.
    """
    try:
        with _only_data(path):
            return dict(dist_checkpointing.load_common_state_dict(str(path)))
    except (CheckpointingException, OSError, pickle.UnpicklingError) as error:
        raise UserError(f"checkpoint {path} cannot be read ({_line(error)}); it is damaged") from error


def load_backbone(directory: Path, score_model: torch.nn.Module) -> None:
    """Give a score model the parameters of a proxy's checkpoint; its head stays as it is."""
    load_model(directory, score_model, without="score_head.")


def load_target(
    directory: Path, context: ParallelContext, model: ModelConfig, vocab_size: int, recompute: bool = False
) -> GPTModel:
    """The LLM as `pretrain()` saved it at any tensor- and pipeline-parallel size, or this rank's pipeline stage of it:
    frozen, in eval mode.

    :param directory: where pretrain() saves, or one of its iter_… directories.
    :param vocab_size: of the tokenizer, before padding.
    :param recompute: as for `build_language_model`, once gradients are asked for and it is in training mode.
    :raises UserError: if the checkpoint is of another architecture or vocabulary.
    """
    path = find(directory)
    _check_architecture(path, model, vocab_size)
    target = build_language_model(model, vocab_size, context, recompute).requires_grad_(False).eval()
    with _only_data(path):
        check_parameters(dist_checkpointing.load_tensors_metadata(str(path)), target, path)
    _load_parameters(target, _read({MODEL: target.sharded_state_dict()}, path)[MODEL], "")
    return target


def _prefix(name: str) -> str:
    return "" if name == MODEL else f"{name}."


def _vector_key(model: str, vector: str) -> str:
    return f"{model}/{vector}"


def _sharded(models: Mapping[str, torch.nn.Module], vectors: Vectors) -> dict[str, Any]:
    """Everything to be saved or loaded, each tensor with its place in the whole."""
    state: dict[str, Any] = {}
    for name, model in models.items():
        sharded = model.sharded_state_dict(prefix=_prefix(name))  # type: ignore[operator]
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        places = get_param_id_to_sharded_param_map(sharded, parameters)
        for vector, tensors in vectors.get(name, {}).items():
            assert len(tensors) == len(parameters) == len(places)
            state[_vector_key(name, vector)] = {
                str(index): make_sharded_optimizer_tensor(places[index], tensor, _vector_key(name, vector))
                for index, tensor in enumerate(tensors)
            }
        state[name] = sharded
    return state


def _read(sharded: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        with _only_data(path):
            return dist_checkpointing.load(sharded, str(path))
    except (CheckpointingException, KeyError, pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(
            f"checkpoint {path} cannot be loaded ({_line(error)}); it is damaged or of another model"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _load_parameters(model: torch.nn.Module, state: Mapping[str, Any], prefix: str) -> None:
    named = {key.removeprefix(prefix): value for key, value in state.items()}
    problems = model.load_state_dict(named, strict=False)
    # Megatron drops what holds no data; a head that was left out on purpose is not in `named` either
    assert not problems.unexpected_keys, problems


def _check_architecture(path: Path, model: ModelConfig, vocab_size: int) -> None:
    arguments = load_common(path).get("args")
    if arguments is None:
        raise UserError(f"{path} was not saved by Megatron's pretrain(): it holds no arguments")
    check_arguments(arguments, model, vocab_size, path)


# Arguments that change what is computed and that no model here uses: off in its checkpoints, absent in those of a
# Megatron that did not know them yet.
_UNUSED_ARGUMENTS = (
    *("layernorm_zero_centered_gamma", "apply_layernorm_1p", "apply_residual_connection_post_layernorm"),
    *("qk_layernorm", "qk_l2_norm", "attention_output_gate", "multi_latent_attention", "window_size", "no_rope_freq"),
    *("experimental_attention_variant", "linear_attention_freq", "use_rope_scaling", "rotary_interleaved"),
    *("rotary_seq_len_interpolation_factor", "squared_relu", "quick_geglu", "openai_gelu", "glu_linear_offset"),
    *("activation_func_clamp_value", "num_experts", "use_mup", "is_hybrid_model", "heterogeneous_layers_config_path"),
)


_SHAPING_ARGUMENTS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "normalization", "swiglu"),
    *("add_bias_linear", "position_embedding_type", "rotary_percent", "rotary_base", "padded_vocab_size"),
    *("untie_embeddings_and_output_weights", "group_query_attention"),
)


def check_same_model(path: Path, arguments: Any) -> None:
    """:param arguments: of the training that runs now.
    :raises UserError: if the checkpoint, an iter_… directory, is of a model that computes something else.
    """
    theirs = load_common(path).get("args")
    if theirs is None:
        raise UserError(f"{path} was not saved by Megatron's pretrain(): it holds no arguments")
    for name in (*_SHAPING_ARGUMENTS, *_UNUSED_ARGUMENTS):
        found, wanted = (getattr(given, name, None) or None for given in (theirs, arguments))
        if found != wanted:
            raise UserError(
                f"checkpoint {path} has {name} {found}, the model in training {wanted}; name one of the same "
                "architecture"
            )


def check_arguments(arguments: Any, model: ModelConfig, vocab_size: int, path: Path) -> None:
    """:param arguments: of Megatron's trainer, as the checkpoint `path` holds them.

    :raises UserError: if they describe another function than the settings.
    """
    architecture = resolve(model)
    expected = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "kv_channels": architecture.head_size,
        "normalization": architecture.normalization,
        # the second in older versions
        "layernorm_epsilon" if hasattr(arguments, "layernorm_epsilon") else "norm_epsilon": architecture.norm_epsilon,
        "swiglu": architecture.activation == "swiglu",
        "add_bias_linear": architecture.bias,
        "position_embedding_type": "rope",
        "rotary_percent": architecture.rotary_percent,
        "rotary_base": architecture.rotary_base,
        "untie_embeddings_and_output_weights": True,
        "padded_vocab_size": padded_vocab_size(vocab_size),
    }
    is_grouped = architecture.num_query_groups != architecture.num_attention_heads
    if is_grouped or getattr(arguments, "group_query_attention", False):
        expected["num_query_groups"] = architecture.num_query_groups
    if not architecture.bias:  # biases of all linear layers include those of the queries, keys and values
        expected["add_qkv_bias"] = False
    found = {name: getattr(arguments, name, "nowhere") for name in expected}
    found |= {name: getattr(arguments, name, None) or None for name in _UNUSED_ARGUMENTS}
    found["softmax_type"] = getattr(arguments, "softmax_type", "vanilla")
    for name, value in found.items():
        if value != (wanted := (expected | {"softmax_type": "vanilla"}).get(name)):
            raise UserError(
                f"checkpoint {path} has {name} {value}, the settings of target.model and data.tokenizer ask for "
                f"{wanted}; change them, or name another checkpoint"
            )


_FIRST_STAGE = {"embedding"}  # modules that only this pipeline stage has
_LAST_STAGE = {"final_layernorm", "output_layer"}


def check_parameters(stored: Iterable[str], model: torch.nn.Module, path: Path) -> None:
    """:param stored: names of all tensors in the checkpoint `path`.

    :raises UserError: if some are parameters that the model has not got.
    """
    known = {place.key for place in model.sharded_state_dict().values()}  # type: ignore[operator]
    others = {"optimizer", "online_reference"}
    others |= (set() if model.pre_process else _FIRST_STAGE) | (set() if model.post_process else _LAST_STAGE)
    more = sorted(name for name in stored if others.isdisjoint(name.split(".")) and name not in known)
    if more:
        raise UserError(
            f"checkpoint {path} has parameters that the model of target.model lacks ({', '.join(more[:3])}); change "
            "the settings, or name another checkpoint"
        )


# Modules whose records (dataclasses and enums) torch_dist's table of contents is made of.
_RECORD_MODULES = frozenset(
    {
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.filesystem",
        "torch.distributed.checkpoint.planner",
        "megatron.core.dist_checkpointing.strategies.torch",
    }
)


class _ContentsUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
        }:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return super().find_class(module, name)
        if module in _RECORD_MODULES and "." not in name:  # a dotted name would reach what the module imports
            found = super().find_class(module, name)
            is_record = dataclasses.is_dataclass(found) or (isinstance(found, type) and issubclass(found, Enum))
            if is_record and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is no part of a checkpoint")


@contextmanager
def _only_data(path: Path) -> Iterator[None]:
    """Inside, reading the checkpoint can build nothing but tensors, numbers and Megatron's own records.

    torch_dist unpickles its table of contents freely, and objects with `weights_only=False`: the first is checked
    before, the second overruled.
    """
    with open(path / ".metadata", "rb") as stream:
        try:
            _ContentsUnpickler(stream).load()
        except Exception as error:  # whatever a damaged pickle makes of itself
            raise pickle.UnpicklingError(str(error)) from error
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
