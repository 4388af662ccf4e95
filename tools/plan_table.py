"""Memory and time of runs that have not begun, as a table in Markdown: one column a configuration.

tools/plan_table.py configs/bliss-410m.yaml configs/bliss-1b.yaml configs/bliss-7b.yaml --pool-tokens 100e9 --tflops 300
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_bliss.config import RunConfig, load_config
from megatron_bliss.errors import UserError, user_errors
from megatron_bliss.mcore.architectures import resolve
from megatron_bliss.orchestration.check import check
from megatron_bliss.orchestration.cost import PoolSize, arm_costs, measure, quantity
from megatron_bliss.orchestration.memory import stage_memory
from megatron_bliss.orchestration.plan import arms

_ROUND = ("cache-target", "bilevel", "score", "fidelity", "pretrain", "evaluate")  # stages of a round that take a GPU


def main() -> None:
    """:raises UserError: for settings that cannot work, or a pool of unknown size."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Memory is a GPU's at its peak, without the CUDA context, NCCL's buffers and fragmentation.",
    )  # fmt: skip
    parser.add_argument("configs", type=Path, nargs="+", metavar="CONFIG", help="settings of a run, YAML")
    parser.add_argument(
        "--pool-tokens", type=float, metavar="N", help="size of the pool; default: that of the shards, where they exist"
    )
    parser.add_argument(
        "--tflops", type=float, default=300, metavar="N",
        help="10^12 floating-point operations that a GPU does in a second of such work (default: 300)",
    )  # fmt: skip
    given = parser.parse_args()
    columns = [_column(path, given.pool_tokens, given.tflops) for path in given.configs]
    rows = [key for key in columns[0] if any(column[key] for column in columns)]
    lines = [["", *(path.stem for path in given.configs)], ["---"] * (len(columns) + 1)]
    lines += [[key, *(column[key] for column in columns)] for key in rows]
    for line in lines:
        print(f"| {' | '.join(line)} |")


def _column(path: Path, pool_tokens: float | None, tflops: float) -> dict[str, str]:
    config = load_config(path, [])
    check(config, Path(path.stem))
    pool = _pool(config, path, pool_tokens)
    vocab_size, arm = config.data.tokenizer.vocab_size, arms(config, Path(path.stem))[0]
    target, proxy = (resolve(model).num_parameters(vocab_size) for model in (config.target.model, config.proxy.model))
    column = {"LLM, proxy": f"{quantity(target)}, {quantity(proxy)}"}
    for command in ("warmup-target", "warmup-proxy", *_ROUND):
        peak = stage_memory(config, command)
        is_used = command != "cache-target" or config.bilevel.uses_cached_target
        column[f"GB a GPU, `{command}`"] = f"{peak.total / 1e9:.1f}" if peak and is_used else ""
    costs = arm_costs(arm, pool)
    hours = {command: (costs[arm.stage_name(command, 1)].flops or 0) / (tflops * 1e12 * 3600) for command in _ROUND}
    for command, amount in hours.items():
        column[f"GPU-hours a round, `{command}`"] = f"{amount:.3g}" if amount else ""
    selection = hours["cache-target"] + hours["bilevel"] + hours["score"]
    column["selection ÷ training of a round"] = f"{selection / hours['pretrain']:.1%}"
    return column


def _pool(config: RunConfig, path: Path, num_tokens: float | None) -> PoolSize:
    if num_tokens is not None:
        return PoolSize(round(num_tokens / config.data.sequence_length), round(num_tokens))
    pool, reason = measure(config)
    if pool is None:
        raise UserError(f"{path}: the pool's size is not known ({reason}); give it as --pool-tokens N")
    return pool


if __name__ == "__main__":
    with user_errors():
        main()
