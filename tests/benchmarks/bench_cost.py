"""What `--dry-run` predicts of memory and FLOPs beside what is measured, on three sizes and layouts."""

import tempfile
from pathlib import Path
from typing import Any

from megatron_bliss.config import ModelConfig
from tests.cost_ranks import compare, write_run

# model, vocabulary, ranks, tensor-parallel size
CASES = {
    "tiny": (ModelConfig(preset="tiny"), 2000, 1, 1),
    "small, tensor parallel": (ModelConfig(preset="small"), 8000, 2, 2),
    "small, data parallel, shared-out optimizer": (ModelConfig(preset="small"), 8000, 2, 1),
}
LAUNCHES = (["warmup-target"], ["warmup-proxy", "bilevel", "score", "fidelity"])  # Megatron sets up ranks of its own


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return {
            name: compare(write_run(Path(folder) / str(number), *case), *LAUNCHES)
            for number, (name, case) in enumerate(CASES.items())
        }
