"""Run an unmodified Megatron training script on a selection, with or without torchrun:

    torchrun … -m megatron_bliss.hooks --selection DIR path/to/pretrain_gpt.py ARGS…

With --online METHOD the tokens of every step are selected too (README: online token selection).
Without --selection the script reads all of its data; on a machine without a GPU it runs on the CPU either way.
With --metrics FILE the loss by domain is noted as often as Megatron logs, and in its TensorBoard where that is on;
without --selection every shard is a domain.
With --prepare-only, in one process, it only builds the index files that the training will look for.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from megatron_bliss.data.selection import Selection
from megatron_bliss.errors import UserError, user_errors
from megatron_bliss.mcore.build_ahead import build_ahead
from megatron_bliss.mcore.script import run_script


def main(arguments: Sequence[str]) -> None:
    """:raises UserError: for bad usage or input.
    :raises SystemExit: as the script does.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megatron_bliss.hooks",
        description="Run an unmodified Megatron training script on a selection of its data.",
    )
    parser.add_argument("--selection", type=Path, metavar="DIR", help="what to train on; all data where not given")
    parser.add_argument("--online", choices=("blade", "rho1", "self"), help="how tokens are selected in every step")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of --online (config/online.py)"
    )
    parser.add_argument(
        "--validation", action="append", default=[], metavar="PREFIX",
        help="validation set that blade's reference is trained on; given several times: sets with equal shares",
    )  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="print what would be read, and stop")
    parser.add_argument(
        "--prepare-only", action="store_true", help="build the data's index files in --data-cache-path, and stop"
    )
    parser.add_argument(
        "--metrics",
        type=Path,
        metavar="FILE",
        help="a metrics.jsonl for the loss by domain",
    )
    parser.add_argument("script", type=Path, metavar="SCRIPT")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS")
    given = parser.parse_args(arguments)
    if given.prepare_only:
        built = build_ahead(given.script, given.arguments, given.selection)
        print(f"{len(built)} index files are in {built[0].parent}", flush=True)
        return
    if not given.verify:
        run_script(given.script, given.arguments, given.selection, _before(given))
        return
    if given.selection is None:
        raise UserError("--verify needs --selection DIR, the selection to be looked at")
    print(_description(Selection.open(given.selection)))


def _before(given: argparse.Namespace) -> Callable[[], None]:
    """What is put between the script and Megatron."""
    online, metrics, selection = _online(given), given.metrics, given.selection

    def install() -> None:
        # first, as it is then called last: it sees the tokens that were chosen, and no pass of the reference
        if metrics is not None:
            from megatron_bliss.mcore import domain_loss

            name_of = Selection.open(selection, in_full=False).domain if selection else lambda prefix: Path(prefix).name
            domain_loss.install(metrics, name_of)
        if online is not None:
            online()

    return install


def _online(given: argparse.Namespace) -> Callable[[], None] | None:
    """What puts the selection of tokens between the script and Megatron."""
    if given.online is None:
        if given.set or given.validation:
            raise UserError("--set and --validation are settings of --online METHOD, which is missing; add it")
        return None
    # here, as the start of a script without it is to stay what it is
    from megatron_bliss.config import load_online_config
    from megatron_bliss.mcore.online import OnlineJob, install
    from megatron_bliss.methods import online_method

    config = load_online_config(given.online, given.set)
    if given.metrics and config.scope == "global-batch":
        raise UserError("--metrics cannot tell domains apart with scope=global-batch; leave out one of the two")
    method = online_method(config)
    assert method is not None
    return partial(install, OnlineJob(config, method, [(1 / len(given.validation), p) for p in given.validation]))


def _description(selection: Selection) -> str:
    lines = [f"selection {selection.directory}, digest {selection.digest[:12]}"]
    for shard in selection.shards:
        counts = shard.counts
        lines.append(
            f"  {shard.record.prefix} ({shard.record.domain}): {counts.kept_sequences} of {shard.record.num_sequences} "
            f"sequences, {counts.kept_tokens} of {shard.record.num_tokens} tokens"
        )
    blend = " ".join(f"{weight:.6g} {prefix}" for weight, prefix in selection.blend)
    return "\n".join([*lines, f"  its blend for --data-path: {blend}"])


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
