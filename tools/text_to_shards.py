#!/usr/bin/env python
"""Turn text into token shards that Megatron reads: PREFIX.bin, PREFIX.idx and PREFIX.json for each domain.

examples:
  a tokenizer of its own, sequences of 1024 tokens
    tools/text_to_shards.py web=crawl.jsonl code=src/ --out shards --train-tokenizer 32000 --cut 1024
  a tokenizer you have (a SentencePiece .model or a Hugging Face tokenizer.json)
    tools/text_to_shards.py books.parquet --field body --out shards --tokenizer tokenizer.json --workers 16
  a validation set of prompts and answers (jsonl with both fields), where only the answers carry loss
    tools/text_to_shards.py lambada=lambada.jsonl --pairs --out shards --tokenizer tokenizer.model --cut 1024
"""

import argparse
import os
from pathlib import Path

from megatron_bliss.data.corpus import Cutting, Encoder, ensure_shard
from megatron_bliss.data.documents import Corpus, corpus_from_files
from megatron_bliss.data.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_bliss.data.validation import build_pairs
from megatron_bliss.errors import UserError, user_errors
from megatron_bliss.wording import counted


def parse_arguments() -> argparse.Namespace:
    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="[NAME=]PATH",
        help="a .jsonl or .parquet file, a plain text file (one document), or a directory of such files; NAME is the "
        "domain and the shard's name (default: the file's), and inputs of one name make one shard",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for shards and tokenizer")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tokenizer", type=Path, metavar="FILE", help="SentencePiece .model or tokenizer.json")
    source.add_argument(
        "--train-tokenizer", type=int, metavar="VOCAB",
        help="train a SentencePiece model with VOCAB pieces on the inputs, as OUT/tokenizer.model",
    )  # fmt: skip
    parser.add_argument(
        "--train-characters", type=int, default=100_000_000, metavar="N",
        help="characters to train the tokenizer on, shared by the domains evenly (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--eod", metavar="TOKEN", help="end-of-document token, where tokenizer.json does not tell")
    parser.add_argument("--field", default="text", help="jsonl field or parquet column (default: %(default)s)")
    parser.add_argument("--cut", type=int, metavar="N", help="sequences of at most N tokens (default: whole documents)")
    parser.add_argument(
        "--min-tokens", type=int, default=1, metavar="N",
        help="drop a document's last sequence if it is shorter than N tokens, and say how many (default: keep all)",
    )  # fmt: skip
    parser.add_argument("--pairs", action="store_true", help="inputs are jsonl with `prompt` and `answer`; needs --cut")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    return parser.parse_args()


def group_inputs(inputs: list[str]) -> dict[str, list[Path]]:
    """Paths of each domain, in the order given."""
    grouped: dict[str, list[Path]] = {}
    for given in inputs:
        name, separator, path = given.partition("=")
        if not separator:
            name, path = Path(given).stem, given
        if not name or "/" in name:
            raise UserError(f"{given!r} has the domain name {name!r}; a name is not empty and has no slash")
        grouped.setdefault(name, []).append(Path(path))
    return grouped


def get_tokenizer(arguments: argparse.Namespace, corpora: list[Corpus]) -> Tokenizer:
    if arguments.tokenizer:
        return load_tokenizer(arguments.tokenizer, arguments.eod)
    part = arguments.train_characters // len(corpora)
    print(f"[tokenizer] training {arguments.train_tokenizer} pieces on up to {part} characters a domain", flush=True)
    texts = (text for corpus in corpora for text in corpus.sample(part))
    path = arguments.out / "tokenizer.model"
    return train_sentencepiece(texts, path, arguments.train_tokenizer, arguments.train_characters)


def main() -> None:
    arguments = parse_arguments()
    with user_errors():
        grouped = group_inputs(arguments.inputs)
        if arguments.pairs:
            build_all_pairs(arguments, grouped)
            return
        corpora = [corpus_from_files(name, paths, arguments.field) for name, paths in grouped.items()]
        cutting = Cutting(arguments.cut, arguments.min_tokens)
        with Encoder(get_tokenizer(arguments, corpora), arguments.workers) as encoder:
            for corpus in corpora:
                prefix = arguments.out / corpus.name
                summary = ensure_shard(corpus, prefix, encoder, cutting)
                print(
                    f"{prefix}: {counted(summary.num_sequences, 'sequence')}, {counted(summary.num_tokens, 'token')}",
                    flush=True,
                )


def build_all_pairs(arguments: argparse.Namespace, grouped: dict[str, list[Path]]) -> None:
    if arguments.tokenizer is None or arguments.cut is None:
        raise UserError("--pairs needs --tokenizer (the pool's) and --cut (the sequence length); give both")
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.eod)
    for name, paths in grouped.items():
        if len(paths) > 1:
            raise UserError(f"--pairs takes one file for {name!r}, not {len(paths)}; join them or name them apart")
        summary = build_pairs(paths[0], arguments.out / name, tokenizer, arguments.cut)
        print(f"{arguments.out / name}: {summary.num_sequences} pairs, {summary.num_loss_tokens} answer tokens")


if __name__ == "__main__":
    main()
