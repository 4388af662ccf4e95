"""`select --scores`: a selection of any scored shards, without a run.

The scores are a directory that `tools/score_shards.py` wrote: `shards.json` lists the shards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

import yaml  # type: ignore[import-untyped]  # omegaconf reads with it
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_bliss.artifacts import digest_json, read_json
from megatron_bliss.config import SelectionConfig
from megatron_bliss.data.ledger import Ledger
from megatron_bliss.data.scores import ScoreFiles
from megatron_bliss.data.seeds import derive
from megatron_bliss.data.selection import Selection
from megatron_bliss.data.shards import ShardRecord
from megatron_bliss.errors import UserError
from megatron_bliss.methods.given import Given
from megatron_bliss.methods.offline import OfflineMethod
from megatron_bliss.methods.perplexity import Perplexity
from megatron_bliss.settings_check import check_selection
from megatron_bliss.stages.choice import Choice, every_sequence
from megatron_bliss.stages.select import finish

_SIZES = ("fraction", "tokens", "threshold")


@dataclass
class ScoredShardsConfig(SelectionConfig):
    """The settings of a selection (`pool` is always `all`), and these."""

    seed: int = 1234  # of the Gumbel noise
    domains: dict[str, str] = field(default_factory=dict)  # name: pattern of shard names, as web-*; else one domain
    weights: dict[str, float] = field(default_factory=dict)  # of the domains, for blend `keep`; none: their tokens


def run(
    scores: Path, output: Path | None, overrides: Sequence[str], earlier: Sequence[Path], dry_run: bool = False
) -> None:
    """Write a selection of scored shards to `output`, or only print it.

    :param overrides: `key=value` of `ScoredShardsConfig`.
    :param earlier: selections whose sequences are taken.
    :raises UserError: for bad settings, unfinished scores, shards that changed, or less than is asked for.
    """
    if output is None and not dry_run:
        raise UserError(f"--scores {scores} needs --output DIR for the selection, or --dry-run")
    if output and output.resolve() in (directory.resolve() for directory in earlier):
        raise UserError(f"--output {output} is an --earlier selection too; give another directory")
    settings, files = load_settings(overrides), ScoreFiles(scores)
    if not (scores / "shards.json").exists():
        raise UserError(
            f"{scores} has no shards.json, so tools/score_shards.py did not write it; select from a run's scores with "
            "--run DIR --round N"
        )
    listing = [ShardRecord(**record) for record in read_json(scores / "shards.json")["shards"]]
    records = [replace(record, domain=_domain(record, settings.domains)) for record in listing]
    if not records:
        raise UserError(f"{scores / 'shards.json'} lists no shards; score at least one")
    names = list(dict.fromkeys(record.domain for record in records))
    check_selection(settings, names)
    if settings.pool != "all":
        raise UserError(f"pool is {settings.pool!r}; scores without a run have no slices, so leave it out")
    if settings.weights and settings.weights.keys() != set(names):
        raise UserError(f"weights are given for {', '.join(settings.weights)}; the domains are {', '.join(names)}")
    for name, weight in settings.weights.items():
        if not 0 < weight < math.inf:
            raise UserError(f"weights gives domain {name!r} weight {weight}; it must be above 0")
    ledger = Ledger([Selection.open(directory) for directory in earlier])
    choice = Choice(
        stage="select",
        records=records,
        method=method_of(files.method),
        settings=settings,
        wanted=every_sequence,
        scores=files.read,
        seed=derive(settings.seed, "select"),
        verify_scores=files.verify,
        ledger=ledger,
        weights=settings.weights or None,
        facts={
            "round": None,
            "tokenizer": files.tokenizer,
            "score_model": files.model_digest,
            "sources": {
                "inventory": digest_json([[record.name, record.domain, record.digest] for record in records]),
                "scores": files.digest,
                "earlier selections": ledger.digest,
            },
        },
    )
    finish(choice, output or Path(), dry_run)


def load_settings(overrides: Sequence[str]) -> ScoredShardsConfig:
    """:raises UserError: for an unknown key or a value of the wrong type."""
    for word in overrides:
        if "=" not in word:
            raise UserError(f"{word!r} is not a setting: write key=value, for example fraction=0.1")
    try:
        given = OmegaConf.from_dotlist(list(overrides))
        settings = OmegaConf.structured(ScoredShardsConfig(pool="all"))
        if any(given.get(size) is not None for size in _SIZES):
            settings.fraction = None  # the default stands back
        found: ScoredShardsConfig = OmegaConf.to_object(OmegaConf.merge(settings, given))  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    except yaml.YAMLError:
        raise UserError(f"{' '.join(overrides)} is not a list of settings; write each as key=value") from None
    return found


def method_of(name: str) -> OfflineMethod:
    """The method whose scores are compared, by the name in the score files."""
    kind, _, keep = name.partition("-")
    return Perplexity(keep) if kind == "perplexity" else Given(name)


def _domain(record: ShardRecord, domains: dict[str, str]) -> str:
    """The first that the shard's name fits.

    :raises UserError: if there are domains, and it fits none.
    """
    for domain, pattern in domains.items():
        if fnmatchcase(record.name, pattern):
            return domain
    if domains:
        raise UserError(f"shard {record.name} fits none of {', '.join(domains.values())}; give domains it fits")
    return record.domain or "all"
