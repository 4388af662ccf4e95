"""`ngrams`: how often each hashed n-gram comes in the round's slice and in the validation set, for the `dsir` method.

One process, on a CPU. What was counted is put on disk chunk by chunk, so a kill loses one chunk.
"""

import io
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatron_bliss import stopping
from megatron_bliss.artifacts import RunPaths, atomic_write, digest_file, read_json, write_json
from megatron_bliss.config import RunConfig, read_saved_config
from megatron_bliss.data import ngrams
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.ngrams import Hashing
from megatron_bliss.data.seeds import derive, hash_positions, uniform
from megatron_bliss.data.shards import Shard, ShardRecord, verify_shard
from megatron_bliss.data.slices import Slicing
from megatron_bliss.data.tokenizers import load_tokenizer
from megatron_bliss.data.validation import ValidationSet
from megatron_bliss.errors import UserError
from megatron_bliss.progress import Progress
from megatron_bliss.stages.inventory import run_inventory
from megatron_bliss.stages.select import tokenizer_facts
from megatron_bliss.stages.sources import resume

_LOG_RATIO, _PARTIAL = "log-ratio.npy", "partial.npz"


def run(run_dir: Path, round_number: int) -> None:
    """Write `round-N/ngrams`: `log-ratio.npy`, float64 [num_buckets], and `manifest.json`; or finish it.

    All tokens of a validation set count, those without loss too: what a set is like shows in its prompts as well. Of
    several sets p is the mixture by `data.validation_weights`.

    :raises UserError: for a changed shard, or settings that need a tokenizer which is not there.
    """
    paths = RunPaths(Path(run_dir))
    config, directory = read_saved_config(paths.config), paths.ngrams(round_number)
    inventory = run_inventory(paths.root, config)
    sources = {
        "inventory": inventory.digest,
        "settings": str(asdict(config.dsir)),
        "tokenizer": str(tokenizer_facts(config.data.tokenizer)),
    }
    resume("ngrams", directory, sources, is_first=True)
    if (directory / "manifest.json").exists():
        return
    hashing = make_hashing(config)
    raw, num_raw = _count_slice(hashing, config, inventory, round_number, directory / _PARTIAL)
    target, num_target = _count_validation(hashing, inventory, config.data.validation_weights)
    for name, num_grams in (("slice", raw.sum()), ("validation set", target.sum())):
        if not num_grams:
            raise UserError(
                f"the {name} has no n-grams of {config.dsir.features}; use more data or dsir.features=tokens"
            )
    with atomic_write(directory / _LOG_RATIO) as stream:
        np.save(stream, ngrams.log_ratio(target, raw), allow_pickle=False)
    facts = {"slice_tokens": num_raw, "validation_tokens": num_target, "sha256": digest_file(directory / _LOG_RATIO)}
    (directory / _PARTIAL).unlink(missing_ok=True)
    write_json(directory / "manifest.json", {"schema": 1, "settings": asdict(config.dsir), **facts})
    print(f"[ngrams] done: {num_raw} tokens of the slice, {num_target} of the validation set", flush=True)


class FittedNgrams:
    """The log-ratio that the stage has written, and sums of it over sequences.

    :raises UserError: if it is missing, was fitted with other settings, or changed.
    """

    def __init__(self, directory: Path, config: RunConfig) -> None:
        manifest, path = read_json(directory / "manifest.json"), directory / _LOG_RATIO
        if manifest["settings"] != asdict(config.dsir):
            raise UserError(f"{directory} was fitted with other settings of dsir; run the stage ngrams again")
        if not path.is_file() or digest_file(path) != manifest["sha256"]:
            raise UserError(f"{path} is not what was written; remove {directory} and run the stage ngrams again")
        self._log_ratio = np.load(path, allow_pickle=False)
        self._hashing = make_hashing(config)

    def sums(self, shard: Shard, ids: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """See `data.ngrams.sums`."""
        return ngrams.sums(self._hashing, self._log_ratio, shard, ids)


def make_hashing(config: RunConfig) -> Hashing:
    """:raises UserError: if words are asked for, and there is no tokenizer to tell them by."""
    settings, tokenizer = config.dsir, config.data.tokenizer
    if settings.features == "tokens":
        reader = ngrams.token_reader(tokenizer.vocab_size, settings.num_buckets)
    else:
        if tokenizer.model is None:
            raise UserError(
                "dsir.features is 'words', and data.tokenizer.model names no file to tell words by; name the "
                "tokenizer's, or set dsir.features=tokens"
            )
        pieces = load_tokenizer(tokenizer.model).pieces()
        # a vocabulary that is padded has ids that stand for nothing
        pieces += [b""] * (tokenizer.vocab_size - len(pieces))
        reader = ngrams.word_reader(pieces, settings.num_buckets)
    return Hashing(reader, settings.ngrams, settings.num_buckets, tokenizer.vocab_size)


def _count_validation(hashing: Hashing, inventory: Inventory, weights: Mapping[str, float]) -> tuple[np.ndarray, int]:
    """Of one set the counts; of several Σ_k w_k p_k, p_k being the shares in a set."""
    shards = {name: ValidationSet.of(record).shard for name, record in inventory.validation.items()}
    found = {name: _total(hashing, shard, np.arange(len(shard))) for name, shard in shards.items()}
    if len(found) == 1:
        return next(iter(found.values()))
    mixture = sum(weights[name] * counts / max(counts.sum(), 1) for name, (counts, _) in found.items())
    return np.asarray(mixture), sum(num_tokens for _, num_tokens in found.values())


def _count_slice(
    hashing: Hashing, config: RunConfig, inventory: Inventory, round_number: int, partial: Path
) -> tuple[np.ndarray, int]:
    """Of the slice, or of a random part of its sequences with about `dsir.fit_tokens` tokens.

    :param partial: where it stands: counts, and the tokens and chunks they are of.
    """
    slicing = Slicing.of(config, inventory)
    offered = sum(record.num_tokens for record in inventory.pool) / (1 if slicing.is_shared else slicing.num_slices)
    share, seed = config.dsir.fit_tokens / max(offered, 1), derive(config.seed, "ngrams", round_number)
    total, num_tokens, done = _read_partial(partial, hashing.num_buckets)
    num_sequences = sum(record.num_sequences for record in inventory.pool)
    progress, seen, counted = Progress("ngrams", num_sequences, "sequences"), 0, 0
    for number, (record, span) in enumerate(_spans(inventory.pool, config.scoring.chunk_sequences)):
        seen += span[1] - span[0]
        if number < done:
            continue
        ids = slicing.ids(record, round_number, span)
        ids = ids[uniform(hash_positions(derive(seed, record.digest), ids)) < share]
        counts, tokens = _total(hashing, verify_shard(record), ids)
        total += counts
        num_tokens, counted = num_tokens + tokens, counted + tokens
        _write_partial(partial, total, num_tokens, number + 1)
        progress.report(seen, counted)
        if stopping.requested():
            stopping.leave("ngrams", seen, num_sequences, "sequences")
    return total, num_tokens


def _spans(records: list[ShardRecord], size: int) -> Iterator[tuple[ShardRecord, tuple[int, int]]]:
    for record in records:
        for start in range(0, record.num_sequences, size):
            yield record, (start, min(start + size, record.num_sequences))


def _total(hashing: Hashing, shard: Shard, ids: np.ndarray) -> tuple[np.ndarray, int]:
    total, num_tokens = np.zeros(hashing.num_buckets, dtype=np.int64), 0
    for counts, tokens in ngrams.count(hashing, shard, ids):
        total += counts
        num_tokens += tokens
    return total, num_tokens


def _read_partial(path: Path, num_buckets: int) -> tuple[np.ndarray, int, int]:
    """Counts, tokens and chunks so far."""
    if not path.exists():
        return np.zeros(num_buckets, dtype=np.int64), 0, 0
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as found:
        return found["counts"], int(found["tokens"]), int(found["chunks"])


def _write_partial(path: Path, counts: np.ndarray, tokens: int, chunks: int) -> None:
    with atomic_write(path) as stream:
        np.savez(stream, counts=counts, tokens=np.int64(tokens), chunks=np.int64(chunks))
