"""From jsonl text to everything an experiment reads: a tokenizer of its own, one shard a domain, validation and test.

The texts are held in memory, so a larger pool is thinned out; to use all of it, build shards with
tools/text_to_shards.py and name them in a run's YAML.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_bliss.artifacts import digest_file, digest_json, read_json, write_json
from megatron_bliss.data.corpus import Cutting, Encoder, ensure_shard
from megatron_bliss.data.deduplicate import deduplicate
from megatron_bliss.data.documents import Corpus, corpus_from_texts, read_documents
from megatron_bliss.data.tokenizers import Tokenizer, train_sentencepiece
from megatron_bliss.errors import UserError
from megatron_bliss.wording import counted

_TOKENIZER_CHARACTERS = 5_000_000  # of the pool, at most, that the tokenizer is trained on
_SMALLEST_VOCABULARY = 512  # pieces; 256 of them are bytes
POOL_BYTES = 40_000_000  # of jsonl, at most; of a larger pool the same share of every domain is drawn
_HELD_OUT_BYTES = 4_000_000  # of the validation and of the test file, at most


@dataclass(frozen=True)
class Prepared:
    """Where everything lies. Prefixes are absolute paths without .bin or .idx."""

    pool: dict[str, str]  # prefix of each domain
    validation: str
    test: str
    tokenizer: str  # SentencePiece model
    vocab_size: int

    @property
    def prefixes(self) -> list[str]:
        return [*self.pool.values(), self.validation, self.test]


def prepare(
    pool: Path, validation: Path, test: Path, out: Path,
    *, vocab_size: int, cut: int, seed: int, num_workers: int = 1, is_in_use: bool = False,
) -> Prepared:  # fmt: skip
    """Read `NAME.jsonl` a domain from the directory `pool`, drop near-duplicates, and write everything below `out`.

    The test set wins over the validation set and both win over the pool: what is like a document of theirs is dropped
    from the pool. Documents of a domain are put in an order drawn from the seed. What an earlier call finished is kept
    if its digests say that it is the same.

    :param cut: tokens a sequence at most.
    :param is_in_use: a run was started on what is there, so it must not be made anew.
    :raises UserError: for a bad line, an empty pool, or a set of which nothing is left.
    """
    out = Path(out).absolute()
    domains = _domain_files(Path(pool), Path(validation), Path(test))
    files = [*domains.items(), ("validation", Path(validation)), ("test", Path(test))]
    inputs = digest_json([[[name, digest_file(path)] for name, path in files], vocab_size, cut, seed])
    record = out / "corpus.json"
    if done := _finished(record, inputs):
        print(f"[corpus] {out} is complete", flush=True)
        return done
    if is_in_use:
        raise UserError(f"{out} was made of other text than there is now; put that back, or start anew elsewhere")
    pool_texts, held_out = _without_duplicates(domains, [Path(test), Path(validation)], seed)
    corpora = [corpus_from_texts(name, texts) for name, texts in pool_texts.items()]
    model = out / "tokenizer.model"
    tokenizer = _train_tokenizer(corpora, model, vocab_size)
    corpora += [corpus_from_texts(name, texts) for name, texts in zip(("test", "validation"), held_out, strict=True)]
    prefixes = {name: str(out / "pool" / name) for name in pool_texts}
    prepared = Prepared(prefixes, str(out / "validation"), str(out / "test"), str(model), tokenizer.vocab_size)
    with Encoder(tokenizer, num_workers) as encoder:
        for corpus, prefix in zip(corpora, [*prefixes.values(), prepared.test, prepared.validation], strict=True):
            ensure_shard(corpus, prefix, encoder, Cutting(cut))
    write_json(record, {"schema": 1, "inputs": inputs, "digests": _digests(prepared), "prepared": asdict(prepared)})
    return prepared


def _train_tokenizer(corpora: list[Corpus], path: Path, vocab_size: int) -> Tokenizer:
    """One with as many pieces as wanted, or as the text has enough for.

    :raises UserError: if there is too little text even for a few.
    """
    while True:
        try:
            return train_sentencepiece(_sample(corpora), path, vocab_size)
        except UserError:
            if vocab_size // 2 < _SMALLEST_VOCABULARY:
                num_bytes = sum(corpus.num_bytes for corpus in corpora)
                raise UserError(
                    f"the pool has {num_bytes / 1e3:.0f} kB of text, too little for a tokenizer, or with too "
                    "few different words; give 100 kB or more of natural text"
                ) from None
            vocab_size //= 2
            print(f"[corpus] there is little text: the tokenizer gets {vocab_size} pieces", flush=True)


def _sample(corpora: list[Corpus]) -> Iterator[str]:
    """The first documents of each domain, as large a part of each as of the others."""
    part = min(1.0, _TOKENIZER_CHARACTERS / sum(corpus.num_bytes for corpus in corpora))
    for corpus in corpora:
        yield from corpus.sample(int(part * corpus.num_bytes))


def _domain_files(pool: Path, validation: Path, test: Path) -> dict[str, Path]:
    for path in (validation, test):
        if not path.is_file():
            raise UserError(f"{path} does not exist; give a jsonl file with a `text` field a line")
    held_out = {validation.resolve(), test.resolve()}
    if len(held_out) < 2:
        raise UserError(f"{validation} is given as validation set and as test set; they must be different documents")
    files = {path.stem: path for path in sorted(pool.glob("*.jsonl")) if path.resolve() not in held_out}
    if not files:
        raise UserError(f"pool {pool} holds no .jsonl files; put one NAME.jsonl a domain there, a `text` field a line")
    return files


def _without_duplicates(
    domains: dict[str, Path], held_out: list[Path], seed: int
) -> tuple[dict[str, list[str]], list[list[str]]]:
    """Documents of each domain, in an order drawn from the seed, and of each held-out file, in their own."""
    paths = [*held_out, *domains.values()]
    share = _share("the pool", domains.values(), POOL_BYTES)
    shares = [*(_share(path.name, [path], _HELD_OUT_BYTES) for path in held_out), *(share for _ in domains)]
    groups = [list(_thinned(path, share, seed)) for path, share in zip(paths, shares, strict=True)]
    kept = []
    for path, group, indices in zip(paths, groups, deduplicate(groups), strict=True):
        texts = [group[index] for index in indices]
        kept_and_dropped = counted(len(texts), "document"), counted(len(group) - len(texts), "near-duplicate")
        print(f"[corpus] {path.name}: {', '.join(kept_and_dropped)} dropped", flush=True)
        if not any(texts) and path in held_out:
            raise UserError(f"{path} has no text that is not in the test set, too; give documents of its own")
        kept.append(texts)
    pool = {}
    for name, texts in zip(domains, kept[len(held_out) :], strict=True):
        random.Random(f"{seed} {name}").shuffle(texts)  # noqa: S311 (not cryptography)
        if any(texts):
            pool[name] = texts
        else:
            print(f"[corpus] domain {name} is left out: it has no documents of its own", flush=True)
    if not pool:
        raise UserError("the pool has no documents that are not near-duplicates of the held-out sets; add text")
    return pool, kept[: len(held_out)]


def _share(name: str, paths: Iterable[Path], max_bytes: int) -> float:
    """Share of the documents to use, so that about `max_bytes` are."""
    size = sum(path.stat().st_size for path in paths)
    if size <= max_bytes:
        return 1.0
    print(
        f"[corpus] {name} has {size / 1e6:.0f} MB: a random {max_bytes / size:.1%} of its documents is used", flush=True
    )
    return max_bytes / size


def _thinned(path: Path, share: float, seed: int) -> Iterator[str]:
    """The texts of a random share of a file's documents, in their order; which ones is drawn from the seed."""
    draws = random.Random(f"{seed} {path.name} share")  # noqa: S311 (not cryptography)
    for document in read_documents(path):
        if draws.random() < share:
            yield document.text


def _digests(prepared: Prepared) -> dict[str, str]:
    files = [f"{prefix}{suffix}" for prefix in prepared.prefixes for suffix in (".idx", ".bin")]
    return {path: digest_file(Path(path)) for path in [*files, prepared.tokenizer]}


def _finished(record: Path, inputs: str) -> Prepared | None:
    """What `record` tells of, if it was made of the same and no file of it is missing or has changed."""
    if not record.is_file():
        return None
    content = read_json(record)
    if content["inputs"] != inputs or not all(
        Path(path).is_file() and digest_file(Path(path)) == digest for path, digest in content["digests"].items()
    ):
        return None
    return Prepared(**content["prepared"])
