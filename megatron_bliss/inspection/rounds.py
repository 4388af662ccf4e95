"""A run and its rounds as they lie on disk, opened for looking at: records, slices, scores, selections, text."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.config import RunConfig, read_saved_config, warmup_run
from megatron_bliss.data.candidates import ShardCandidates
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.selection import Selection
from megatron_bliss.data.shards import Shard, ShardRecord
from megatron_bliss.data.slices import HELD_OUT, Slicing, slice_numbers
from megatron_bliss.data.tokenizers import Tokenizer, load_tokenizer
from megatron_bliss.data.topk import CHUNK, Chunk
from megatron_bliss.errors import UserError
from megatron_bliss.methods.offline import OfflineMethod
from megatron_bliss.methods.random import Random
from megatron_bliss.stages.choice import Choice
from megatron_bliss.stages.guards import guarded
from megatron_bliss.stages.inventory import run_inventory
from megatron_bliss.stages.select import round_choice, round_method

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

    def slice_of(self, record: ShardRecord, sequence_id: int) -> int:
        """Slice of a sequence; HELD_OUT for none."""
        slicing, span = self.slicing, (sequence_id, sequence_id + 1)
        share = slicing.held_out_share(record.domain)
        return int(slice_numbers(record, slicing.seed, slicing.num_slices, share, span)[0])

    def num_held_out(self, record: ShardRecord, ids: np.ndarray) -> int:
        """How many of some sequences of a shard are held out of every slice."""
        return int(np.isin(ids, self.slicing.ids(record, HELD_OUT), assume_unique=True).sum())

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
        return Selection.open(self.directory, in_full=False)

    @property
    def method(self) -> OfflineMethod:
        return round_method(self.run.config, guarded(self.home, self.number)) if self.number else Random()

    @cached_property
    def choice(self) -> Choice:
        """:raises UserError: if scores or an earlier selection that it needs are missing."""
        config = self.run.config if self.home == self.run.paths else read_saved_config(self.home.config)
        return round_choice(self.home, config, self.number or None)

    @cached_property
    def _candidates(self) -> list[ShardCandidates]:
        return self.choice.candidates()

    def chunks(self) -> Iterator[tuple[ShardRecord, Chunk]]:
        """All candidates of the round, shard by shard, with their scores as they are compared."""
        for candidates in self._candidates:
            for start in range(0, candidates.num_sequences, CHUNK):
                chunk = candidates.read(start, min(start + CHUNK, candidates.num_sequences))
                yield candidates.record, chunk

    def candidate(self, record: ShardRecord, sequence_id: int) -> Chunk:
        """One of them; empty if the sequence is none."""
        [candidates] = [each for each in self._candidates if each.record.name == record.name]
        return candidates.read(sequence_id, sequence_id + 1)

    def kept(self, record: ShardRecord, ids: np.ndarray) -> np.ndarray:
        """Which of a shard's ascending ids are kept: bool [len(ids)]."""
        kept = self.selection.ids(record.prefix)
        places = np.searchsorted(kept, ids)
        inside = places < len(kept)
        found = np.zeros(len(ids), dtype=bool)
        found[inside] = kept[places[inside]] == ids[inside]
        return found
