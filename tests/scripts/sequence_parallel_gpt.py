"""The user's training script with --sequence-parallel, and torch's norms marked for it as Transformer Engine's are."""

import runpy
import sys
from pathlib import Path

from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megatron_bliss.mcore.models import torch_norm

if __name__ == "__main__":
    # Megatron's own refuses sequence parallelism, wherever it is built
    WrappedTorchNorm.__new__ = lambda _, config, hidden_size, eps=1e-5, **__: torch_norm(config, hidden_size, eps)
    sys.argv.append("--sequence-parallel")
    runpy.run_path(str(Path(__file__).with_name("pretrain_gpt.py")), run_name="__main__")
