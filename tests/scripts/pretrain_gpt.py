"""A user's training script: it knows Megatron only, and imports and calls what Megatron-LM's pretrain_gpt.py does."""

from functools import partial

import torch
from local_helper import FORWARD_KEYS  # beside the script, as gpt_builders.py is beside Megatron-LM's
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, inprocess_restart, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.datasets.fim_dataset import GPTFIMDataset
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage


def get_batch(data_iterator, vp_stage):
    if not is_first_or_last_pipeline_stage(vp_stage):
        return [None] * len(FORWARD_KEYS)
    args = get_args()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        batch = {key: sample[key].cuda() if key in sample else None for key in (*FORWARD_KEYS, "cu_seqlens")}
    batch = get_batch_on_this_tp_rank(
        batch, False, False, args.create_attention_mask_in_dataloader,
        parallel_state.get_tensor_model_parallel_src_rank(), parallel_state.get_tensor_model_parallel_group(),
        args.context_parallel_size, tp_rank, args.micro_batch_size, args.seq_length, False,
        args.pipeline_model_parallel_size, parallel_state.is_pipeline_first_stage(),
        parallel_state.is_pipeline_last_stage(),
    )  # fmt: skip
    batch = get_batch_on_this_cp_rank(batch, False, parallel_state.get_context_parallel_group())
    return [batch[key] for key in FORWARD_KEYS]


def loss_func(loss_mask, output):
    mask = loss_mask.view(-1).float()
    loss, num_tokens = torch.sum(output.view(-1).float() * mask), mask.sum().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.cat([loss.detach().view(1), num_tokens.view(1)])}


def forward_step(data_iterator, model):
    tokens, labels, loss_mask, mask, positions = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    return model(tokens, positions, mask, labels=labels, loss_mask=loss_mask), partial(loss_func, loss_mask)


def is_built_on_rank(vp_stage=None):
    return parallel_state.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)


def train_valid_test_datasets_provider(num_samples, vp_stage=None):
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed, sequence_length=args.seq_length, blend=blend, blend_per_split=blend_per_split,
        split=args.split, path_to_cache=args.data_cache_path, tokenizer=build_tokenizer(args),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        fast_cache_load=args.dataloader_fast_cache_load, defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
    )  # fmt: skip
    kinds = {
        (True, False, False): SFTDataset,
        (False, True, False): MockGPTDataset,
        (False, False, True): GPTFIMDataset,
    }
    dataset = kinds.get((args.sft, args.mock_data, args.fim_data), GPTDataset)
    return BlendedMegatronDatasetBuilder(dataset, num_samples, partial(is_built_on_rank, vp_stage), config).build()


if __name__ == "__main__":
    train_valid_test_datasets_provider.is_distributed = True
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    arguments = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    pretrain(
        pretrain_cfg_container_from_args(arguments, gpt_config_from_args(arguments)),
        train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        store=store,
    )
