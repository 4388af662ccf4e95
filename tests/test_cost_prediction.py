"""Memory and FLOPs as predicted: by hand, and beside what real stages take. `make bench NAME=cost` has more layouts."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_bliss.config import ModelConfig, RunConfig, load_config
from megatron_bliss.mcore.architectures import PRESETS, resolve
from megatron_bliss.mcore.losses import GPU_CHUNK
from megatron_bliss.mcore.output_layer import GPU_BLOCK
from megatron_bliss.orchestration import memory
from megatron_bliss.orchestration.check import check
from megatron_bliss.orchestration.memory import stage_memory
from tests.cost_ranks import compare, write_run

ROOT = Path(__file__).parents[1]


def settings(*words: str) -> RunConfig:
    needed = ["data.validation=v", "data.tokenizer.vocab_size=50277", "data.pool=[{name: web, prefixes: [w]}]"]
    return load_config(None, [*needed, *words])


def test_parameters_on_a_rank() -> None:
    for name, architecture in PRESETS.items():
        assert architecture.num_parameters_on_rank(1000) == architecture.num_parameters(1000), name
    small = resolve(ModelConfig(preset="small"))  # 4 layers of 128, 512 in the MLP, 1024 rows of vocabulary
    copies = 4 * 128 + 2 * 128  # two norms, biases of projection and of the MLP's second layer
    block = (12 * 128 * 128 + 3 * 128 + 512) // 2 + copies
    assert small.num_parameters_on_rank(1000, 2) == 4 * block + 2 * 1024 * 128 // 2 + 256
    assert small.num_parameters_on_rank(1000, 2, 2) == 2 * block + 1024 * 128 // 2 + 256
    assert small.num_parameters_on_rank(1000, 2, has_output=False) == 4 * block + 1024 * 128 // 2 + 256


def test_the_parts_of_a_training() -> None:
    config = settings("target.model.bf16=true", "target.micro_batch_size=2")
    model = resolve(config.target.model)
    numel = model.num_parameters(50277)
    peak = stage_memory(config, "warmup-target")
    assert peak is not None
    assert (peak.parameters, peak.gradients, peak.optimizer) == (2 * numel, 4 * numel, 12 * numel)
    assert peak.logits == 2 * 1024 * 50304 * (2 + 4)
    assert peak.total == sum(peak.amounts)
    shared = replace(config, target=replace(config.target, extra_args=["--use-distributed-optimizer"]))
    shared.launch.nproc_per_node, shared.launch.nnodes = 4, 2
    found = stage_memory(shared, "warmup-target")
    assert found is not None
    assert found.optimizer == 12 * numel / 8
    words = ["--recompute-granularity", "full"]
    again = stage_memory(replace(config, target=replace(config.target, extra_args=words)), "warmup-target")
    assert again is not None
    assert again.activations < peak.activations / 5
    assert stage_memory(config, "select") is None
    assert stage_memory(replace(config, method="dsir"), "score") is None


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ("bilevel.gamma=0.01", "bilevel.gamma=0"),
        ("bilevel.solver=conjugate-gradient", "bilevel.solver=averaged"),
        ("proxy.recompute=false", "proxy.recompute=true"),
        ("proxy.tensor_parallel=1", "proxy.tensor_parallel=2"),
        ("bilevel.curvature=gauss-newton", "bilevel.curvature=none"),
        ("bilevel.micro_batch_size=4", "bilevel.micro_batch_size=2"),
    ],
)
def test_what_takes_less_memory_in_the_bilevel_loop(more: str, less: str) -> None:
    found = [stage_memory(settings(setting), "bilevel") for setting in (more, less)]
    assert all(found)
    assert found[0].total > found[1].total  # type: ignore[union-attr]


def test_chunks_are_those_of_the_losses() -> None:
    assert (memory.GPU_CHUNK, memory.GPU_BLOCK) == (GPU_CHUNK, GPU_BLOCK)


def test_the_table_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    [command] = [line for line in readme.splitlines() if "tools/plan_table.py configs" in line]
    result = subprocess.run(
        [sys.executable, *command.split()[1:]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert len(result.stdout.splitlines()) > 10
    assert result.stdout in readme
    refused = subprocess.run(
        [sys.executable, "tools/plan_table.py", "configs/bliss-410m.yaml"], cwd=ROOT, capture_output=True, text=True
    )
    assert (refused.returncode, "give it as --pool-tokens N" in refused.stderr) == (2, True)


@pytest.mark.parametrize("name", ["try", "bliss-410m", "bliss-1b", "bliss-7b"])
def test_ready_configurations_can_run(name: str, tmp_path: Path) -> None:
    check(load_config(ROOT / "configs" / f"{name}.yaml", []), tmp_path)


def test_predicted_is_what_stages_take(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ModelConfig(preset="tiny"), 2000, 1, 1)
    launches = (
        ["warmup-target"],
        ["warmup-proxy", "bilevel", "score", "fidelity"],
    )  # Megatron sets up ranks of its own
    for command, found in compare(run, *launches).items():
        assert found["memory_ratio"] == pytest.approx(1, abs=0.15), command
        assert found["flops_ratio"] == pytest.approx(1, abs=0.01), command
