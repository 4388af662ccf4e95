#!/usr/bin/env python
"""Score every sequence of token shards with the score model or the proxy of a run: OUT/NAME.npy, OUT/manifest.json.

Called again, it goes on where it was stopped. Any number of calls may work side by side on one OUT.

examples:
  on this machine's 8 GPUs, with what round 3 has learned
    torchrun --nproc-per-node 8 tools/score_shards.py --shards data/web-*.bin --out scores --run runs/main --round 3
  a checkpoint that was copied from somewhere, with the run.yaml it was trained with
    tools/score_shards.py --shards data/web-00 --out scores --score-checkpoint given/bilevel --settings given/run.yaml
  a look at the sizes only; then in bfloat16, in larger batches
    tools/score_shards.py --shards data/web-00 --out scores --run runs/main --round 3 --dry-run
    tools/score_shards.py --shards data/web-00 --out scores --run runs/main --round 3 \\
      --set scoring.bf16=true --set scoring.batch_tokens=65536
"""

import argparse
from pathlib import Path

from megatron_bliss.errors import UserError, user_errors


def parse_arguments() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shards", nargs="+", required=True, metavar="PREFIX", help="paths; .bin and .idx may be left out or not"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for the scores")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="RUN", help="a run whose checkpoint is used; needs --round")
    source.add_argument(
        "--score-checkpoint", type=Path, metavar="DIR",
        help="a checkpoint: of a score model (RUN/round-N/bilevel) or, for method perplexity, of a proxy",
    )  # fmt: skip
    parser.add_argument("--round", type=int, metavar="N", help="round of RUN, from 1")
    parser.add_argument(
        "--settings", type=Path, metavar="YAML", help="settings of the checkpoint (default: run.yaml of its run)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting; may be given several times"
    )
    parser.add_argument("--dry-run", action="store_true", help="only print what would be scored")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    with user_errors():
        from megatron_bliss.stages import score_shards

        prefixes = list(dict.fromkeys(path.removesuffix(".idx").removesuffix(".bin") for path in arguments.shards))
        if arguments.run:
            if not arguments.round:
                raise UserError(f"--run {arguments.run} needs the round whose checkpoint is to score: give --round N")
            config, checkpoint = score_shards.of_run(arguments.run, arguments.round, arguments.set)
        else:
            given = arguments.score_checkpoint
            config, checkpoint = score_shards.of_checkpoint(given, arguments.settings, arguments.set)
        if arguments.dry_run:
            print(score_shards.describe(prefixes, config, checkpoint))
        else:
            score_shards.run(prefixes, config, checkpoint, arguments.out)


if __name__ == "__main__":
    main()
