"""Shards, validation sets and tokenizer of a run: whether they can be read, and whether they agree."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_bliss.artifacts import digest_blocks, read_json
from megatron_bliss.config import RunConfig
from megatron_bliss.data.shard_checks import beyond_vocabulary, check_index, spaced
from megatron_bliss.data.shards import Shard
from megatron_bliss.data.tokenizers import Tokenizer, load_tokenizer
from megatron_bliss.data.validation import ValidationSet
from megatron_bliss.doctor.findings import Finding, broken
from megatron_bliss.errors import UserError
from megatron_bliss.wording import counted

SAMPLED_SEQUENCES = 20_000  # whose token ids are looked at, of all shards together
_MOST_OF_A_SHARD, _LEAST_OF_A_SHARD = 1000, 4
_SAMPLED_TEXTS = 128  # sequences that are decoded and encoded again
_SAMPLED_DOCUMENTS = 1000  # whose last token is looked at
_MOST_LISTED = 10  # broken shards, before the others are only counted
_AGREEMENT = 0.95  # of ids that come back; cuts inside words cost a few, another tokenizer a tenth or more
_NO_STAGE = "no stage starts: `inventory` refuses it"
_REBUILD = "build the shard again (tools/text_to_shards.py), copy it again, or give the right path in data"


@dataclass(frozen=True)
class Opened:
    """A shard that could be opened."""

    domain: str
    shard: Shard


def check_data(config: RunConfig, measured_sets: Iterable[tuple[str, str]], in_full: bool) -> list[Finding]:
    """:param measured_sets: name and prefix of validation and test sets, those of control arms too.
    :param in_full: look at all tokens and index entries instead of samples.
    """
    pool, findings = _open_pool(config)
    sets, of_sets = _open_sets(measured_sets)
    findings += of_sets
    count = sum(len(domain.prefixes) for domain in config.data.pool)
    share = min(max(SAMPLED_SEQUENCES // max(count, 1), _LEAST_OF_A_SHARD), _MOST_OF_A_SHARD)
    opened = [*pool, *sets]
    findings += _listed(_bad_shards(opened, config.data.tokenizer.vocab_size, None if in_full else share))
    findings += _listed(_same_data(opened))
    if len({each.shard.dtype for each in opened}) > 1:
        value = ", ".join(sorted({each.shard.dtype.name for each in opened}))
        findings.append(Finding("token dtype", "broken", value, _NO_STAGE, "build all shards with one tokenizer"))
    return [*findings, *check_tokenizer(config, opened, pool)]


def _open_pool(config: RunConfig) -> tuple[list[Opened], list[Finding]]:
    opened: list[Opened] = []
    findings: list[Finding] = []
    problems: list[Finding] = []
    for domain in config.data.pool:
        shards: list[Shard] = []
        for prefix in domain.prefixes:
            try:
                shards.append(_open(prefix))
            except UserError as error:
                problems.append(broken(f"shard {Path(prefix).name}", error, _NO_STAGE, _REBUILD))
        opened += [Opened(domain.name, shard) for shard in shards]
        if len(shards) == len(domain.prefixes):
            findings.append(Finding(f"pool: {domain.name}", "ok", _sizes(shards)))
    return opened, [*findings, *_listed(problems)]


def _open(prefix: str) -> Shard:
    """:raises UserError: if it is bad or empty."""
    shard = Shard(prefix)
    if not len(shard):
        raise UserError(f"shard {prefix} has no sequence in it; leave it out or build it again")
    return shard


def _sizes(shards: list[Shard]) -> str:
    tokens, sequences = sum(shard.num_tokens for shard in shards), sum(len(shard) for shard in shards)
    files = f"{len(shards)} shards, " if len(shards) > 1 else ""
    return f"{files}{counted(sequences, 'sequence')}, {counted(tokens, 'token')}, {shards[0].dtype.name}"


def _open_sets(measured_sets: Iterable[tuple[str, str]]) -> tuple[list[Opened], list[Finding]]:
    opened: list[Opened] = []
    findings: list[Finding] = []
    for name, prefix in measured_sets:
        try:
            found = ValidationSet.open(prefix)
        except UserError as error:
            findings.append(broken(name, error, _NO_STAGE, _REBUILD))
            continue
        mask = "no mask: all tokens carry loss" if found.mask is None else f"mask: {found.loss_share:.1%} carry loss"
        findings.append(Finding(name, "ok", f"{_sizes([found.shard])}; {mask}"))
        opened.append(Opened(name, found.shard))
    return opened, findings


def _bad_shards(opened: list[Opened], vocab_size: int, num_sequences: int | None) -> Iterator[Finding]:
    for each in opened:
        shard, name = each.shard, f"shard {Path(each.shard.prefix).name}"
        try:
            check_index(shard, in_full=num_sequences is None)
        except UserError as error:
            yield broken(name, error, _NO_STAGE, _REBUILD)
            continue
        found = beyond_vocabulary(shard, vocab_size, num_sequences)
        if found:
            value = f"{shard.prefix}: sequence {found[0]} has token id {found[1]}, "
            value += f"and data.tokenizer.vocab_size is {vocab_size}"
            remedy = "data.tokenizer.vocab_size=SIZE of the tokenizer that the shard was made with"
            yield Finding(name, "broken", value, _NO_STAGE, remedy)


def _same_data(opened: list[Opened]) -> Iterator[Finding]:
    """Shards that are the same, the validation set in the pool above all."""
    seen: dict[tuple[int, int, str], Opened] = {}
    for each in opened:
        key = (len(each.shard), each.shard.num_tokens, digest_blocks(each.shard.bin_path))
        first = seen.setdefault(key, each)
        if first is not each:
            value = f"{first.shard.prefix} ({first.domain}) and {each.shard.prefix} ({each.domain}) are the same data"
            remedy = "list it once, and keep validation and test data out of the pool"
            yield Finding(f"shard {Path(each.shard.prefix).name}", "broken", value, _NO_STAGE, remedy)


def _listed(findings: Iterable[Finding]) -> list[Finding]:
    """The first few, and how many there are beside them."""
    found = list(findings)
    rest = found[_MOST_LISTED:]
    more = Finding("shards", "broken", f"{len(rest)} more are bad", _NO_STAGE, "mend those above, and look again")
    return [*found[:_MOST_LISTED], *([more] if rest else [])]


def check_tokenizer(config: RunConfig, opened: list[Opened], pool: list[Opened]) -> list[Finding]:
    """Whether the tokenizer's file fits the settings, and the shards it."""
    settings, name = config.data.tokenizer, "tokenizer"
    if settings.model is None:
        if settings.type in ("SentencePieceTokenizer", "HuggingFaceTokenizer"):
            value, costs = f"{settings.type} without data.tokenizer.model", "Megatron stops before its first step"
            return [Finding(name, "broken", value, costs, "data.tokenizer.model=/path/to/the/tokenizer")]
        costs = "`inspect` and `explain` show ids instead of text; dsir needs dsir.features=tokens"
        value = f"{settings.type}, no file; {settings.vocab_size} ids"
        return [Finding(name, "gap", value, costs, "data.tokenizer.model=/path/to/the/tokenizer")]
    if settings.type == "HuggingFaceTokenizer" and not Path(settings.model).exists():
        value, costs = f"{settings.model} is no file here, so a name on a hub", "training needs the network, or a cache"
        return [Finding(name, "gap", value, costs, "download it, and data.tokenizer.model=/path/to/the/folder")]
    try:
        tokenizer = load_tokenizer(settings.model)
    except UserError as error:
        return [broken(name, error, "Megatron stops before its first step", "name the tokenizer's file")]
    return [*_check_size(config, tokenizer), *_check_texts(tokenizer, opened), *_check_ends(tokenizer, pool)]


def _check_size(config: RunConfig, tokenizer: Tokenizer) -> list[Finding]:
    settings = config.data.tokenizer
    if tokenizer.megatron_type != settings.type:
        costs, remedy = "Megatron cannot read the file", f"data.tokenizer.type={tokenizer.megatron_type}"
        return [Finding("tokenizer", "broken", f"{tokenizer.path} is not of {settings.type}", costs, remedy)]
    value = f"{tokenizer.path} has {tokenizer.vocab_size} ids"
    if tokenizer.vocab_size == settings.vocab_size:
        return [Finding("tokenizer", "ok", f"{value}, as the settings say; {tokenizer.eod} ends a document")]
    value += f", data.tokenizer.vocab_size is {settings.vocab_size}"
    remedy = f"data.tokenizer.vocab_size={tokenizer.vocab_size}"
    if tokenizer.vocab_size > settings.vocab_size:
        costs = "ids beyond the embedding end a training in an index error, in the middle of it"
        return [Finding("tokenizer", "broken", value, costs, remedy)]
    costs = "rows of the embedding that no text uses; ids beyond the tokenizer's cannot be decoded"
    return [Finding("tokenizer", "gap", value, costs, remedy)]


def _check_texts(tokenizer: Tokenizer, opened: list[Opened]) -> list[Finding]:
    """Whether the shards were made with this tokenizer: what is noted beside them or, else, whether ids that are
    decoded and encoded again come back."""
    noted = {each.shard.prefix: _noted_digest(each.shard.prefix) for each in opened}
    unknown = [each.shard for each in opened if noted[each.shard.prefix] is None]
    others = [prefix for prefix, digest in noted.items() if digest not in (None, tokenizer.digest)]
    name = "shards and tokenizer"
    costs = "decoded texts are not what the LLM reads; dsir and benchmarks measure nonsense"
    remedy = "data.tokenizer.model=the tokenizer that the shards were made with, or build them again"
    if others:
        value = f"made with another tokenizer: {counted(len(others), 'shard')}, such as {others[0]}"
        return [Finding(name, "broken", value, costs, remedy)]
    if not unknown:
        return [Finding(name, "ok", f"made with this tokenizer: {counted(len(noted), 'shard')}")]
    shards = [unknown[index] for index in spaced(len(unknown), _SAMPLED_TEXTS).tolist()]
    each_shard = max(_SAMPLED_TEXTS // len(shards), 1)
    shares = {shard.prefix: _agreement(tokenizer, shard, each_shard) for shard in shards}
    worst = min(shares, key=lambda prefix: shares[prefix])
    value = f"{shares[worst]:.1%} of ids come back when {worst} is decoded and encoded again"
    if shares[worst] >= _AGREEMENT:
        return [Finding(name, "ok", f"at least {value}")]
    return [Finding(name, "broken", f"only {value}", costs, remedy)]


def _noted_digest(prefix: str) -> str | None:
    """Digest of the tokenizer in PREFIX.json, if this project made the shard."""
    try:
        digest = read_json(Path(f"{prefix}.json")).get("tokenizer_digest")
    except UserError:
        return None
    return digest if isinstance(digest, str) else None


def _agreement(tokenizer: Tokenizer, shard: Shard, num_sequences: int) -> float:
    """Share of the ids of some sequences, 0 to 1, that are there again after decoding and encoding."""
    same = total = 0
    for sequence_id in spaced(len(shard), num_sequences).tolist():
        ids = [token for token in shard[sequence_id].tolist() if token != tokenizer.eod]
        total += len(ids)
        readable = [token for token in ids if 0 <= token < tokenizer.vocab_size]
        [again] = tokenizer.encode_batch([tokenizer.decode(readable)])
        same += sum((Counter(ids) & Counter(again)).values())
    return same / total if total else 1.0


def _check_ends(tokenizer: Tokenizer, pool: list[Opened]) -> list[Finding]:
    """Whether documents end with the tokenizer's end of document."""
    ended = count = 0
    for each in pool:
        starts, shard = each.shard.document_starts, each.shard
        for document in spaced(len(starts) - 1, max(_SAMPLED_DOCUMENTS // len(pool), 1)).tolist():
            if starts[document + 1] <= starts[document]:
                continue
            tokens = shard[int(starts[document + 1]) - 1]
            count += 1
            ended += bool(len(tokens)) and int(tokens[-1]) == tokenizer.eod
    if not count:
        return []
    value = f"{ended / count:.0%} of sampled documents end with id {tokenizer.eod}"
    if ended:
        return [Finding("end of document", "ok", value)]
    costs = "the LLM never learns where a text ends, and packed texts run into one another"
    return [Finding("end of document", "gap", value, costs, "build the shards with an end of document (--append-eod)")]
