"""The packaged training script, noting in the file RECORD how many tokens of each micro-batch are noise, and kept."""

import json
import os
from functools import partial

from megatron.core.enums import ModelType
from megatron.training import get_args, inprocess_restart, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from megatron_bliss.mcore import pretrain_gpt


class Peeking:
    def __init__(self, iterator):
        self.iterator = iterator

    def __next__(self):
        self.batch = next(self.iterator)
        return self.batch


def loss_func(is_noise, loss_mask, output):
    kept = loss_mask > 0
    record = {"step": get_args().curr_iteration, "tokens": is_noise.numel(), "noise": int(is_noise.sum())}
    record |= {"kept": int(kept.sum()), "noise_kept": int((is_noise & kept).sum())}
    with open(os.environ["RECORD"], "a") as stream:
        stream.write(json.dumps(record) + "\n")
    return pretrain_gpt.loss_func(loss_mask, output)


def forward_step(data_iterator, model):
    peeking = Peeking(data_iterator)
    output, function = pretrain_gpt.forward_step(peeking, model)
    # a walk goes from t to t + 1, see tests/tiny_run.py
    is_noise = peeking.batch["labels"] != (peeking.batch["tokens"] + 1) % (get_args().padded_vocab_size - 1)
    return output, partial(loss_func, is_noise, *function.args)


if __name__ == "__main__":
    pretrain_gpt.datasets_provider.is_distributed = True
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    arguments = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    container = pretrain_cfg_container_from_args(arguments, gpt_config_from_args(arguments))
    pretrain(container, pretrain_gpt.datasets_provider, ModelType.encoder_or_decoder, forward_step, store=store)
