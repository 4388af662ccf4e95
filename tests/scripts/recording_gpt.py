"""The packaged training script, noting in the file RECORD which tokens each step reads and has as labels."""

import json
import os

from megatron.core.enums import ModelType
from megatron.training import get_args, inprocess_restart, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from megatron_bliss.mcore import pretrain_gpt


class Recorder:
    def __init__(self, iterator):
        self.iterator = iterator

    def __next__(self):
        batch = next(self.iterator)
        for tokens, labels in zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True):
            with open(os.environ["RECORD"], "a") as stream:
                record = {"step": get_args().curr_iteration + 1, "tokens": [*tokens, labels[-1]]}
                stream.write(json.dumps(record) + "\n")
        return batch


def forward_step(data_iterator, model):
    return pretrain_gpt.forward_step(Recorder(data_iterator), model)


if __name__ == "__main__":
    pretrain_gpt.datasets_provider.is_distributed = True
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    arguments = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    container = pretrain_cfg_container_from_args(arguments, gpt_config_from_args(arguments))
    pretrain(container, pretrain_gpt.datasets_provider, ModelType.encoder_or_decoder, forward_step, store=store)
