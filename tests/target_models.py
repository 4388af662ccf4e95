"""Ranks' work for tests/test_target.py: a checkpoint of Megatron's trainer, read by the side processes.

As a program, `python -m tests.target_models RUN`: the evaluate stage after the warm-up, which the command line has not.
"""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.config import ModelConfig, RunConfig, read_saved_config
from megatron_bliss.data.shards import Shard
from megatron_bliss.errors import UserError
from megatron_bliss.mcore import checkpoint_files, checkpoints, parallel
from megatron_bliss.mcore.batches import make_batch
from megatron_bliss.mcore.models import logits, positions, token_losses
from megatron_bliss.mcore.parallel import ParallelContext
from megatron_bliss.stages import evaluate


def read_target(rank: int, run: Path) -> dict[str, Any]:
    paths, config = RunPaths(run), read_saved_config(RunPaths(run).config)
    context = parallel.initialize(1, False, seed=1)
    target = checkpoints.load_target(
        paths.warmup_target, context, config.target.model, config.data.tokenizer.vocab_size
    )
    tokens = torch.arange(48).reshape(2, 24)
    with torch.no_grad():
        batch = make_batch(np.pad(tokens.numpy(), ((0, 0), (0, 1))), context.device)  # the last is only predicted
        found = logits(target, batch).view(24, 2, -1).transpose(0, 1)
        expected = _megatrons_own(checkpoint_files.find(paths.warmup_target))(tokens, positions(tokens), None)
    return {
        "difference": float((found - expected).abs().max()),
        "spread": float(found.std()),
        "frozen": not any(parameter.requires_grad for parameter in target.parameters()) and not target.training,
        "refusals": _refusals(paths.warmup_target, config, context),
        "changed": _changed(checkpoint_files.find(paths.warmup_target), config, target),
        "losses": _losses(paths.evaluation(0) / "decay", config, context),
    }


def _megatrons_own(checkpoint: Path) -> Any:
    """The model as Megatron's own builder makes it from the arguments it was trained with."""
    from megatron.core import dist_checkpointing
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    arguments = dist_checkpointing.load_common_state_dict(str(checkpoint))["args"]
    assert arguments.tensor_model_parallel_size == 2
    arguments.tensor_model_parallel_size = 1
    model = GPTModelBuilder(gpt_config_from_args(arguments)).build_model(
        ProcessGroupCollection.use_mpu_process_groups()
    )
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(checkpoint))
    model.load_state_dict(state["model"], strict=False)
    return model


def _refusals(directory: Path, config: RunConfig, context: ParallelContext) -> list[str]:
    model, vocab_size = config.target.model, config.data.tokenizer.vocab_size
    cases: list[tuple[ModelConfig, int]] = [
        (replace(model, num_layers=3), vocab_size),
        (replace(model, ffn_hidden_size=96), vocab_size),
        (replace(model, preset="llama-0.5b", num_attention_heads=2, num_layers=2), vocab_size),
        (model, vocab_size + 500),
    ]
    messages = []
    for wrong, size in cases:
        try:
            checkpoints.load_target(directory, context, wrong, size)
            messages.append("loaded")
        except UserError as error:
            messages.append(str(error))
    return messages


def _changed(checkpoint: Path, config: RunConfig, target: Any) -> list[str]:
    """What is said of the checkpoint's arguments and parameters with one of them changed."""
    from megatron.core import dist_checkpointing

    arguments = vars(dist_checkpointing.load_common_state_dict(str(checkpoint))["args"])
    stored = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    messages = []
    for change in ({"layernorm_epsilon": 0.1}, {"squared_relu": True}, {"qk_layernorm": True}, {"kv_channels": ...}):
        changed = {name: value for name, value in (arguments | change).items() if value is not ...}
        try:
            checkpoints.check_arguments(
                SimpleNamespace(**changed), config.target.model, config.data.tokenizer.vocab_size, checkpoint
            )
            messages.append("passed")
        except UserError as error:
            messages.append(str(error))
    try:
        checkpoints.check_parameters([*stored, "decoder.layers.self_attention.q_layernorm.weight"], target, checkpoint)
        messages.append("passed")
    except UserError as error:
        messages.append(str(error))
    return messages


def _losses(checkpoint: Path, config: RunConfig, context: ParallelContext) -> dict[str, float]:
    """Mean losses per token, sequence by sequence, without batches or windows."""
    target = checkpoints.load_target(checkpoint, context, config.target.model, config.data.tokenizer.vocab_size)
    means = {}
    assert config.data.test is not None
    for name, prefix in (("validation_loss", config.data.validation), ("test_loss", config.data.test)):
        shard, total, count = Shard(prefix), 0.0, 0
        for index in range(len(shard)):
            with torch.no_grad():
                losses = token_losses(target, make_batch([shard[index]], context.device))
            total, count = total + float(losses.double().sum()), count + losses.numel()
        means[name] = total / count
    return means


if __name__ == "__main__":
    evaluate.run(Path(sys.argv[1]), 0)
