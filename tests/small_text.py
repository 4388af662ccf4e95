"""Small made-up text and tokenizers for tests of corpus building."""

import json
import random
from pathlib import Path

import tokenizers

_ONSETS, _VOWELS, _ENDS = ("str", "pl", "m", "qu", "ch"), ("a", "ee", "o", "u"), ("nd", "rt", "ll", "x")
_WORDS = [onset + vowel + end for onset in _ONSETS for vowel in _VOWELS for end in _ENDS]


def sentences(count: int, seed: int = 0) -> str:
    """Lines of 5 to 12 made-up words."""
    generator = random.Random(seed)
    return "".join(" ".join(generator.choices(_WORDS, k=generator.randint(5, 12))) + ".\n" for _ in range(count))


def documents(count: int, seed: int = 0) -> list[str]:
    return [sentences(3 + index % 5, seed * 10_000 + index) for index in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_tokenizer_json(folder: Path, eod_token: str = "<|endoftext|>") -> Path:
    """A byte-level BPE with one special token; it is told to cut and pad, which corpus building must not do."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[eod_token],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(50), trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
