#!/usr/bin/env python
"""Show what is in token shards: a table of them, and single sequences as text.

examples:
  tools/inspect_shards.py shards/web shards/code
  tools/inspect_shards.py shards --show 0 --show 17 --tokenizer shards/tokenizer.model
"""

import argparse
from pathlib import Path

import numpy as np

from megatron_bliss.data.shards import Shard, take_inventory
from megatron_bliss.data.tokenizers import Tokenizer, load_tokenizer
from megatron_bliss.data.validation import ValidationSet
from megatron_bliss.errors import UserError, user_errors

_QUANTILES = (0, 0.1, 0.5, 0.9, 1)


def parse_arguments() -> argparse.Namespace:
    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "shards", nargs="+", metavar="PREFIX", help="path without .bin or .idx, or a directory to search for shards"
    )
    parser.add_argument(
        "--show", type=int, action="append", default=[], metavar="ID",
        help="print this sequence of each shard; may be given several times",
    )  # fmt: skip
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="decodes sequences (default: ids are printed)")
    parser.add_argument("--eod", metavar="TOKEN", help="end-of-document token, where tokenizer.json does not tell")
    return parser.parse_args()


def find_prefixes(given: list[str]) -> list[str]:
    prefixes: list[str] = []
    for path in given:
        if Path(path).is_dir():
            found = sorted(str(file.with_suffix("")) for file in Path(path).rglob("*.idx"))
            if not found:
                raise UserError(f"{path} holds no shards (.idx files); give a prefix or another directory")
            prefixes += found
        else:
            prefixes.append(path.removesuffix(".idx").removesuffix(".bin"))
    return prefixes


def print_table(prefixes: list[str]) -> None:
    width = max(len(prefix) for prefix in prefixes)
    quantiles = "/".join(f"{quantile:.0%}" for quantile in _QUANTILES)
    heads = f"{'sequences':>11} {'tokens':>13} {'dtype':<6} {'loss':>6} {'digest':<16}"
    print(f"{'shard':<{width}} {heads} length at {quantiles}")
    for prefix in prefixes:
        (record,) = take_inventory({"": [prefix]})
        lengths, share = "-", 0.0
        if record.num_sequences:
            lengths = "/".join(f"{n:.0f}" for n in np.quantile(Shard(prefix).sequence_lengths, _QUANTILES))
            share = ValidationSet.open(prefix).loss_share
        figures = f"{record.num_sequences:>11} {record.num_tokens:>13} {record.dtype:<6} {share:>6.1%}"
        print(f"{prefix:<{width}} {figures} {record.digest[:16]} {lengths}")


def show(prefix: str, sequence_id: int, tokenizer: Tokenizer | None) -> None:
    shard = Shard(prefix)
    if not 0 <= sequence_id < len(shard):
        raise UserError(f"{prefix} has sequences 0 to {len(shard) - 1}; there is no {sequence_id}")
    tokens = shard[sequence_id]
    if tokenizer and len(tokens) and tokens.max() >= tokenizer.vocab_size:
        raise UserError(f"{prefix} has id {tokens.max()}, beyond the tokenizer's {tokenizer.vocab_size}; give its own")
    print(f"--- {prefix} {sequence_id}: {len(tokens)} tokens")
    print(tokenizer.decode(tokens.tolist()) if tokenizer else " ".join(map(str, tokens)))


def main() -> None:
    arguments = parse_arguments()
    with user_errors():
        prefixes = find_prefixes(arguments.shards)
        tokenizer = load_tokenizer(arguments.tokenizer, arguments.eod) if arguments.tokenizer else None
        print_table(prefixes)
        for prefix in prefixes:
            for sequence_id in arguments.show:
                show(prefix, sequence_id, tokenizer)


if __name__ == "__main__":
    main()
