"""What bench_hook's processes need of Megatron, imported once; nothing is measured here."""

import logging

import torch
from megatron.core.datasets import blended_megatron_dataset_builder as megatron_builder
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_bliss.mcore import dataset as hook

__all__ = ["GPTDataset", "GPTDatasetConfig", "helpers", "hook", "megatron_builder"]

logging.disable(logging.INFO)
torch.set_num_threads(1)
