"""A run and its rounds as they lie on disk, opened for looking at: records, slices, scores, selections, text."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.config import RunConfig, read_saved_config, warmup_run
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.scores import ScoreFiles
from megatron_bliss.data.selection import Selection
from megatron_bliss.data.shards import Shard, ShardRecord
from megatron_bliss.data.slices import Slicing
from megatron_bliss.data.tokenizers import Tokenizer, load_tokenizer
from megatron_bliss.errors import UserError
from megatron_bliss.methods import offline_method
from megatron_bliss.methods.offline import OfflineMethod
from megatron_bliss.methods.random import Random
from megatron_bliss.stages.inventory import run_inventory
from megatron_bliss.stages.select import selection_seed

_DECODED = ("SentencePieceTokenizer", "HuggingFaceTokenizer")  # of Megatron's tokenizer types


class Run:
    """A run, or a control arm.

    :raises UserError: if the directory is no run, or has no inventory yet.
    """

    def __init__(self, run_dir: Path) -> None:
        self.paths = RunPaths(Path(run_dir))
        self.config: RunConfig = read_saved_config(self.paths.config)
        self.inventory: Inventory = run_inventory(self.paths.root, self.config)
        self.slicing = Slicing.of(self.config, self.inventory)

    def round(self, number: int) -> "Round":
        """:param number: 0 for the warm-up, which may lie in another run.
        :raises UserError: if the run has no such round.
        """
        if number > self.config.rounds:
            raise UserError(f"{self.paths.root} has rounds 1 to {self.config.rounds}; there is no round {number}")
        home = warmup_run(self.config, self.paths) if number == 0 else self.paths
        return Round(self, home, number)

    @property
    def selected_rounds(self) -> list["Round"]:
        """Those with a selection, the warm-up among them, in order."""
        rounds = [self.round(number) for number in range(self.config.rounds + 1)]
        return [one for one in rounds if one.is_selected]

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The run's, if it is one that can be read here."""
        settings = self.config.data.tokenizer
        if settings.type not in _DECODED or settings.model is None or not Path(settings.model).exists():
            return None
        return load_tokenizer(settings.model)

    def text(self, record: ShardRecord, sequence_id: int) -> str:
        """A sequence as text, or its ids where the tokenizer cannot be read."""
        tokens = Shard(record.prefix)[sequence_id].tolist()
        return self.tokenizer.decode(tokens) if self.tokenizer else " ".join(map(str, tokens))


@dataclass(frozen=True)
class Round:
    """One round of a run; 0 is the warm-up."""

    run: Run
    home: RunPaths  # where it lies
    number: int

    @property
    def directory(self) -> Path:
        """Of its selection."""
        return self.home.selection(self.number) if self.number else self.home.warmup_selection

    @property
    def is_selected(self) -> bool:
        return (self.directory / "manifest.json").exists()

    @cached_property
    def selection(self) -> Selection:
        """:raises UserError: if there is none, or it does not fit the shards."""
        return Selection.open(self.directory)

    @property
    def method(self) -> OfflineMethod:
        return offline_method(self.run.config) if self.number else Random()

    @property
    def has_scores(self) -> bool:
        """Whether its scores can be read or, where no model makes them, drawn."""
        return self.method.scored_by == "none" or (self.home.scores(self.number) / "manifest.json").exists()

    @cached_property
    def score_files(self) -> ScoreFiles | None:
        """:raises UserError: if they are missing or unfinished."""
        return None if self.method.scored_by == "none" else ScoreFiles(self.home.scores(self.number))

    def raw_scores(self, record: ShardRecord, ids: np.ndarray) -> np.ndarray:
        """What the score files hold of a shard's sequences: float32 [len(ids)]."""
        if self.score_files is not None:
            return self.score_files.read(record, ids)
        seed = selection_seed(self.run.config, self.home, self.number or None)
        return self.method.score_without_model(record, ids, seed)

    def candidates(self) -> list[tuple[ShardRecord, np.ndarray, np.ndarray]]:
        """Every shard of the pool with the ids of the round's slice and their scores as they are compared: int32 and
        float32 [n]."""
        records, slicing = self.run.inventory.pool, self.run.slicing
        ids = [slicing.ids(record, self.number) for record in records]
        scores = self.method.finish([self.raw_scores(record, own) for record, own in zip(records, ids, strict=True)])
        return list(zip(records, ids, scores, strict=True))

    def kept(self, record: ShardRecord, ids: np.ndarray) -> np.ndarray:
        """Which of a shard's ascending ids are kept: bool [len(ids)]."""
        kept = self.selection.ids(record.prefix)
        places = np.searchsorted(kept, ids)
        inside = places < len(kept)
        found = np.zeros(len(ids), dtype=bool)
        found[inside] = kept[places[inside]] == ids[inside]
        return found
