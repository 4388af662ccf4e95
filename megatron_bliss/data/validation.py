"""Validation sets: shards, of text or of prompts with answers where only the answers carry loss.

PREFIX.mask beside a shard is a numpy file, uint8 [num_tokens], token by token like PREFIX.bin: 1 where the token
carries loss as a label. Without that file all tokens do. The first token of a sequence is never a label, whatever the
mask says.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_bliss.artifacts import atomic_write, digest_bytes, digest_file, write_json
from megatron_bliss.data.corpus import forget
from megatron_bliss.data.documents import read_jsonl, text_field
from megatron_bliss.data.shards import Shard, ShardRecord, ShardWriter, token_dtype, verify_shard
from megatron_bliss.data.tokenizers import Tokenizer
from megatron_bliss.errors import UserError


@dataclass(frozen=True)
class PairsSummary:
    """PREFIX.json of a set of prompts and answers."""

    tokenizer_digest: str
    vocab_size: int
    sequence_length: int
    source_digest: str
    num_sequences: int
    num_tokens: int
    num_loss_tokens: int
    num_truncated_prompts: int


@dataclass(frozen=True)
class ValidationSet:
    """An opened validation set; `ValidationSet.open(prefix)` makes one."""

    shard: Shard
    mask: np.ndarray | None  # uint8 [num_tokens], or None: every token carries loss
    digest: str  # of shard and mask

    @classmethod
    def open(cls, prefix: str | Path) -> "ValidationSet":
        """:raises UserError: if the shard is bad or empty, or the mask does not fit it."""
        shard = Shard(prefix)
        if not len(shard):
            raise UserError(f"validation set {prefix} has no sequences; build it from more text")
        digests = [digest_file(shard.idx_path), digest_file(shard.bin_path)]
        path = Path(f"{prefix}.mask")
        if not path.is_file():
            return cls(shard, None, digest_bytes(*(digest.encode() for digest in digests)))
        try:
            mask = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError):
            raise UserError(f"{path} is not a numpy file of numbers; build the validation set again") from None
        if mask.dtype != np.uint8 or mask.shape != (shard.num_tokens,):
            raise UserError(
                f"{path} holds {mask.dtype} {list(mask.shape)}, its shard needs uint8 [{shard.num_tokens}]; "
                "build the validation set again"
            )
        if mask.max() != 1:
            raise UserError(f"{path} has the highest value {mask.max()}; it must be 1 where a token carries loss")
        digests.append(digest_file(path))
        return cls(shard, mask, digest_bytes(*(digest.encode() for digest in digests)))

    @classmethod
    def of(cls, record: ShardRecord) -> "ValidationSet":
        """The set of an inventory.

        :raises UserError: if its bytes changed, those of its mask too.
        """
        verify_shard(record)
        verify_mask(record)
        return cls.open(record.prefix)

    def __len__(self) -> int:
        return len(self.shard)

    @property
    def loss_share(self) -> float:
        """The part of the tokens, 0 to 1, that carries loss."""
        return 1.0 if self.mask is None else float(self.mask.mean())

    def get(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [L] in the shard's dtype, and their loss mask [L], bool."""
        tokens = self.shard[index]
        if self.mask is None:
            return tokens, np.ones(len(tokens), dtype=bool)
        start = int(self.shard.sequence_offsets[index]) // self.shard.dtype.itemsize
        return tokens, self.mask[start : start + len(tokens)].astype(bool)


def mask_digest(prefix: str | Path) -> str | None:
    """SHA-256 (hex) of PREFIX.mask; None where all tokens carry loss."""
    path = Path(f"{prefix}.mask")
    return digest_file(path) if path.is_file() else None


def verify_mask(record: ShardRecord) -> None:
    """:raises UserError: if the mask is not the one of the inventory, or is there where there was none, or is gone."""
    if mask_digest(record.prefix) != record.mask_sha256:
        raise UserError(
            f"{record.prefix}.mask is not what this run was started with (it changed, appeared or is gone); restore "
            "it, or start a new run directory"
        )


def build_pairs(path: Path, prefix: str | Path, tokenizer: Tokenizer, sequence_length: int) -> PairsSummary:
    """Write a validation set from a jsonl file with the fields `prompt` and `answer`, one sequence a line.

    Prompt and answer are tokenized as one text; the answer is what follows the part that the prompt alone has as
    well, as models are scored on such pairs. A prompt that is too long loses tokens on its left.

    :param sequence_length: tokens a sequence at most.
    :raises UserError: naming file and line, for an empty prompt or answer or an answer that does not fit.
    """
    lengths: list[int] = []
    masks: list[np.ndarray] = []
    num_truncated = 0
    with ShardWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer:
        for where, prompt, answer in _pairs(path):
            with_answer, alone = tokenizer.encode_batch([prompt + answer, prompt])
            num_prompt = min(_common_prefix(with_answer, alone), len(with_answer) - 1)
            num_answer = len(with_answer) - num_prompt
            if num_answer >= sequence_length or not num_prompt:
                raise UserError(
                    f"{where}: the answer's {num_answer} tokens and one of the prompt do not fit into sequences of "
                    f"{sequence_length}; shorten the answer or raise the sequence length"
                )
            tokens = with_answer[-sequence_length:]
            num_truncated += len(tokens) < len(with_answer)
            mask = np.zeros(len(tokens), dtype=np.uint8)
            mask[-num_answer:] = 1
            writer.add_document([tokens])
            lengths.append(len(tokens))
            masks.append(mask)
        if not masks:
            raise UserError(f"{path} holds no prompts and answers; give one JSON object a line")
        forget(prefix)
        with atomic_write(Path(f"{prefix}.mask")) as stream:
            np.save(stream, np.concatenate(masks), allow_pickle=False)
    if num_truncated:
        print(f"{path}: {num_truncated} of {len(masks)} prompts were cut on the left to {sequence_length} tokens")
    summary = PairsSummary(
        tokenizer.digest, tokenizer.vocab_size, sequence_length, digest_file(path), len(masks), sum(lengths),
        int(sum(mask.sum() for mask in masks)), num_truncated,
    )  # fmt: skip
    write_json(Path(f"{prefix}.json"), {"schema": 1, **summary.__dict__})
    return summary


def _pairs(path: Path) -> Iterator[tuple[str, str, str]]:
    for number, record, _ in read_jsonl(path):
        prompt, answer = (text_field(path, number, record, field) for field in ("prompt", "answer"))
        if not prompt or not answer:
            raise UserError(
                f"{path}:{number} has an empty {'answer' if prompt else 'prompt'}; fill it or remove the line"
            )
        yield f"{path}:{number}", prompt, answer


def _common_prefix(first: list[int], second: list[int]) -> int:
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)
