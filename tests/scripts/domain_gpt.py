"""The packaged training script, noting in the file RECORD each sample's dataset, summed loss and tokens with loss."""

import json
import os

from megatron.core.enums import ModelType
from megatron.training import get_args, inprocess_restart, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from megatron_bliss.mcore import pretrain_gpt


def forward_step(data_iterator, model):
    batch = next(data_iterator)
    output, loss_function = pretrain_gpt.forward_step(iter([batch]), model)
    with open(os.environ["RECORD"], "a") as stream:
        rows = zip(batch["dataset_id"].tolist(), output.tolist(), batch["loss_mask"].tolist(), strict=True)
        for dataset, losses, mask in rows:
            loss = sum(value * weight for value, weight in zip(losses, mask, strict=True))
            record = {"step": get_args().curr_iteration + 1, "dataset": dataset, "loss": loss, "tokens": sum(mask)}
            stream.write(json.dumps(record) + "\n")
    return output, loss_function


if __name__ == "__main__":
    pretrain_gpt.datasets_provider.is_distributed = True
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    arguments = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    container = pretrain_cfg_container_from_args(arguments, gpt_config_from_args(arguments))
    pretrain(container, pretrain_gpt.datasets_provider, ModelType.encoder_or_decoder, forward_step, store=store)
