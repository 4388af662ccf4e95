"""What the scripts beside this do last: a training as the packaged script's, with a forward step of their own."""

from megatron.core.enums import ModelType
from megatron.training import inprocess_restart, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from megatron_bliss.mcore.pretrain_gpt import datasets_provider


def train(forward_step):
    datasets_provider.is_distributed = True
    wrapped, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    arguments = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    container = pretrain_cfg_container_from_args(arguments, gpt_config_from_args(arguments))
    wrapped(container, datasets_provider, ModelType.encoder_or_decoder, forward_step, store=store)
