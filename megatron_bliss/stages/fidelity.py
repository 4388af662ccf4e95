"""`fidelity`: does what helps the proxy help the LLM, and do the scores know it? A number a round.

On a sample of the round's slice, the usefulness of each sequence (`mcore.usefulness`: by how much training on it lowers
the loss on the validation sets, to first order) is measured twice: for the LLM as the round begins with it, and for the
proxy that the round's scores come from. `results.json` has the rank correlations (Spearman) of the two with each other
and with the scores, each with its 95 % interval. Nothing is selected by it; the report shows it and warns.

Tensor × data parallel, the LLM at its own layout and the proxy at its own.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_bliss import stopping
from megatron_bliss.artifacts import RunPaths, atomic_write, digest_tree, write_json
from megatron_bliss.config import RunConfig, read_saved_config
from megatron_bliss.data.correlation import spearman, spearman_interval
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.sampling import SequenceSampler, permute
from megatron_bliss.data.scores import ScoreFiles
from megatron_bliss.data.seeds import derive
from megatron_bliss.data.shards import Shard, ShardRecord, verify_shard
from megatron_bliss.data.slices import Slicing
from megatron_bliss.data.validation import ValidationSet
from megatron_bliss.errors import UserError
from megatron_bliss.mcore import checkpoint_files, checkpoints, parallel
from megatron_bliss.mcore.models import build_language_model
from megatron_bliss.mcore.parallel import ParallelContext, agreed, same
from megatron_bliss.mcore.scorer import Pass, ValidationSequences
from megatron_bliss.mcore.stopping import Vote
from megatron_bliss.mcore.usefulness import Usefulness
from megatron_bliss.methods import offline_method
from megatron_bliss.progress import Progress
from megatron_bliss.stages.inventory import run_inventory
from megatron_bliss.stages.sources import resume, target_at
from megatron_bliss.stages.warmup_proxy import proxy_directory

_CHUNK = 100  # sequences that are measured, and put on disk, at a time
TARGET, PROXY = "target", "proxy"


def run(run_dir: Path, round_number: int) -> None:
    """Write `round-N/fidelity/results.json`, or what is missing of it. All ranks call it.

    :raises UserError: without the round's scores or one of the two models, or where a loss is no number.
    """
    paths = RunPaths(Path(run_dir))
    config, directory = read_saved_config(paths.config), paths.fidelity(round_number)
    sides = [_target(paths, config, round_number), _proxy(paths, config, round_number)]
    context = sides[0].join(config.seed)
    with agreed(context):
        inventory, scores = run_inventory(paths.root, config), ScoreFiles(paths.scores(round_number))
        sample = Sample.draw(config, inventory, round_number)
        sources = {"inventory": inventory.digest, "scores": scores.digest, "sample": str(len(sample))}
        sources |= {side.name: digest_tree(checkpoint_files.find(side.checkpoint)) for side in sides}
        resume("fidelity", directory, sources, context.is_first)
        validation = _validation(config, inventory, round_number)
    work = _Work(directory, sample, prints=context.is_first)
    same(context, work.done, f"the number of sequences measured in {directory}")
    if same(context, int(results_path(directory).exists()), f"the presence (1) of {results_path(directory)}"):
        return
    for side in sides:
        context = side.join(config.seed)
        if work.lacks(side.name):
            forward = Pass(context, config.data.sequence_length, side.batch_tokens)
            work.measure(side.name, Usefulness(side.load(context), forward, validation), context)
        gc.collect()  # its model
        torch.cuda.empty_cache()  # and that memory; nothing happens without a GPU
    with agreed(context):
        if context.is_first:
            measured = work.known | {"scores": sample.scores(scores)}
            results = judge(measured, derive(config.seed, "fidelity", round_number, "interval"))
            results |= {"sequences": len(sample), "iteration": config.round_end(round_number - 1)}
            write_json(results_path(directory), {"schema": 1, **results})
            found = results["correlations"]["scores_target"]["spearman"]
            print(f"[fidelity] done: rank correlation of the scores with what helps the LLM {found}", flush=True)


def results_path(directory: Path) -> Path:
    return directory / "results.json"


def judge(measured: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """What `results.json` says of a sample.

    :param measured: by name (target, proxy, scores), higher is better: [n] each.
    """
    correlations = {}
    for one, other in (("scores", TARGET), (PROXY, TARGET), ("scores", PROXY)):
        low, high = spearman_interval(measured[one], measured[other], seed) or (None, None)
        found = {"spearman": spearman(measured[one], measured[other]), "low": low, "high": high}
        correlations[f"{one}_{other}"] = found
    return {"correlations": correlations}


@dataclass
class Sample:
    """Some sequences of the pool with their shards, in random order."""

    records: list[ShardRecord]
    shards: list[Shard]
    drawn: list[tuple[int, int]]  # index of the shard, id
    lengths: np.ndarray = field(init=False)  # tokens of each, [n]

    def __post_init__(self) -> None:
        self.lengths = np.array([self.shards[index].sequence_lengths[id_] for index, id_ in self.drawn])

    @classmethod
    def draw(cls, config: RunConfig, inventory: Inventory, round_number: int) -> "Sample":
        """Of the round's slice, each sequence once: a function of (seed, round).

        :raises UserError: if there is none, or a shard changed.
        """
        ids = Slicing.of(config, inventory).ids_by_name(round_number)
        sampler = SequenceSampler(inventory.pool, ids, derive(config.seed, "fidelity", round_number))
        drawn = sampler.batch(0, min(config.fidelity.sequences, len(sampler)))
        return cls(inventory.pool, [verify_shard(record) for record in inventory.pool], drawn)

    def __len__(self) -> int:
        return len(self.drawn)

    def get(self, index: int) -> tuple[np.ndarray, None]:
        """Token ids [length]; None: all but the first are to be predicted."""
        shard, sequence_id = self.drawn[index]
        return self.shards[shard][sequence_id], None

    def part(self, start: int, stop: int) -> "Sample":
        return Sample(self.records, self.shards, self.drawn[start:stop])

    def scores(self, files: ScoreFiles) -> np.ndarray:
        """float32 [n].

        :raises UserError: if one is missing.
        """
        found = [files.read(self.records[index], np.array([sequence_id])) for index, sequence_id in self.drawn]
        return np.concatenate(found)


@dataclass(frozen=True)
class _Side:
    """One of the two models, and how it lies on the ranks."""

    name: str
    checkpoint: Path
    load: Callable[[ParallelContext], Any]
    tensor_parallel: int
    sequence_parallel: bool
    batch_tokens: int  # positions in a pass at most

    def join(self, seed: int) -> ParallelContext:
        return parallel.initialize(self.tensor_parallel, self.sequence_parallel, seed)


def _target(paths: RunPaths, config: RunConfig, round_number: int) -> _Side:
    target = config.target
    checkpoint = target_at(paths, config, config.round_end(round_number - 1))

    def load(context: ParallelContext) -> Any:
        vocab_size = config.data.tokenizer.vocab_size
        model = checkpoints.load_target(checkpoint, context, target.model, vocab_size, target.recomputes)
        return model.requires_grad_(True).train()

    batch_tokens = target.micro_batch_size * config.data.sequence_length
    return _Side(TARGET, checkpoint, load, target.tensor_parallel, target.sequence_parallel, batch_tokens)


def _proxy(paths: RunPaths, config: RunConfig, round_number: int) -> _Side:
    """As the bilevel loop left it; the warmed-up one for a method whose score model learned from that."""
    proxy = config.proxy
    is_trained = offline_method(config).learns == "bilevel"
    checkpoint = paths.bilevel(round_number) if is_trained else proxy_directory(paths, config)

    def load(context: ParallelContext) -> Any:
        model = build_language_model(proxy.model, config.data.tokenizer.vocab_size, context, proxy.recompute)
        checkpoints.load_model(checkpoint, model)
        return model

    batch_tokens = config.bilevel.micro_batch_size * config.data.sequence_length
    return _Side(PROXY, checkpoint, load, proxy.tensor_parallel, proxy.sequence_parallel, batch_tokens)


def _validation(
    config: RunConfig, inventory: Inventory, round_number: int
) -> dict[str, tuple[float, ValidationSequences]]:
    """Of each set its weight, by `data.validation_weights` also where these move in the bilevel loop, and a sample."""
    found = {}
    for name, record in inventory.validation.items():
        whole = ValidationSet.of(record)
        count = min(config.fidelity.sequences, len(whole))
        seed = derive(config.seed, "fidelity", round_number, "validation", name)
        ids = np.sort(permute(np.arange(count), len(whole), seed))
        found[name] = config.data.validation_weights[name], ValidationSequences(whole, ids)
    return found


class _Work:
    """What was measured so far: usefulness of the first sequences of the sample to each model, float64 [known], and a
    file of it a model, which grows by chunks."""

    def __init__(self, directory: Path, sample: Sample, prints: bool) -> None:
        self._directory, self._sample, self._num_tokens = directory, sample, 0
        paths = {name: self._path(name) for name in (TARGET, PROXY)}
        self.known = {
            name: np.load(path, allow_pickle=False) if path.exists() else np.empty(0) for name, path in paths.items()
        }
        self._total = len(paths) * len(sample)
        self._progress = Progress("fidelity", self._total, "sequences", start=self.done) if prints else None

    def lacks(self, name: str) -> bool:
        return len(self.known[name]) < len(self._sample)

    def measure(self, name: str, usefulness: Usefulness, context: ParallelContext) -> None:
        """The rest of one model's. All ranks call it, and leave together where one was asked to stop."""
        vote = Vote(context.device)
        while self.lacks(name):
            start = len(self.known[name])
            part = self._sample.part(start, start + _CHUNK)
            self.known[name] = np.concatenate([self.known[name], usefulness(part)])
            self._num_tokens += int(part.lengths.sum())
            with agreed(context):
                if not np.isfinite(self.known[name]).all():
                    raise UserError(f"the {name}'s loss on some sequence of the pool is no number: it has diverged")
                if context.is_first:
                    with atomic_write(self._path(name)) as stream:
                        np.save(stream, self.known[name], allow_pickle=False)
            if self._progress is not None:
                self._progress.report(self.done, self._num_tokens)
            if vote() and self.done < self._total:
                stopping.leave("fidelity", self.done, self._total, "sequences")

    @property
    def done(self) -> int:
        """Sequences measured, over both models."""
        return sum(map(len, self.known.values()))

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.npy"
