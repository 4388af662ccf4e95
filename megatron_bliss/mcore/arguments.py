"""A run's settings as the argument list of a Megatron training script.

The LLM is one line of iterations: the warm-up's W steps, then S steps a round. Megatron counts them in samples and is
told where the data changes (`--phase-transition-iterations`): there it saves and exits, and the next round goes on with
optimizer, learning rate and counters as they were. The learning rate warms up and stays; only a decay branch, which no
round continues from, takes it down.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_bliss.config import RunConfig
from megatron_bliss.errors import UserError
from megatron_bliss.mcore.architectures import padded_vocab_size, resolve

# Flags with which Megatron does not ask for, or does not use, the sequence ids of a split.
_REFUSED_FLAGS = {
    "--dataloader-fast-cache-load": "it builds the dataset without looking at which sequences are wanted",
    "--dataloader-defer-npy-index-mmap": "it counts every sequence of the shard, wanted or not",
    "--mock-data": "it trains on made-up tokens",
    "--sft": "its dataset packs conversations, not sequences of a shard",
}

_ADAM = ("--adam-beta1", "0.9", "--adam-beta2", "0.95", "--adam-eps", "1e-8")


def refuse_flags(arguments: Sequence[str]) -> None:
    """:raises UserError: if the script's arguments hold a flag that would bypass the selection."""
    for word in arguments:
        if (name := word.split("=")[0]) in _REFUSED_FLAGS:
            raise UserError(f"{name} cannot be used with a selection: {_REFUSED_FLAGS[name]}; leave the flag out")


@dataclass(frozen=True)
class Files:
    """Where a training process reads and writes."""

    data: Path  # JSON for --per-split-data-args-path
    index_cache: Path
    save: Path
    load: Path | None = None  # a directory of checkpoints


def split_blends(blend: Sequence[tuple[float, str]], validation: str) -> dict[str, list[str] | None]:
    """The content of the file for --per-split-data-args-path: the training blend, and a validation shard, of which
    nothing is read with --eval-iters 0.

    :param blend: (weight, prefix) of each shard.
    """
    return {
        "train": [word for weight, prefix in blend for word in (repr(weight), prefix)],
        "valid": [validation],
        "test": None,
    }


def training_arguments(config: RunConfig, files: Files) -> list[str]:
    """For the main line: it runs from the loaded iteration to the end of that round."""
    ends = [config.round_end(number) for number in range(config.rounds + 1)]
    decay_start = ends[-1]  # of a decay that the main line never comes to
    return _arguments(config, files, ends[:-1], ends[-1], decay_start, max(config.evaluation.decay_steps, 1))


def decay_arguments(config: RunConfig, round_number: int, files: Files) -> list[str]:
    """For the decay branch after a round: it trains on the round's selection while the learning rate falls.

    It goes on where the round stopped in that data only if the branch's steps need no further epoch of any domain's
    selection beyond those that the round alone needs: Megatron shuffles all epochs of a phase at once, so with more of
    them the branch sees the same selection in another order, sequences that the round has just seen among them.
    """
    start = config.round_end(round_number)
    starts_of_phases = [config.round_end(number) for number in range(round_number)]
    steps = config.evaluation.decay_steps
    return _arguments(config, files, starts_of_phases, start + steps, start, steps)


def _arguments(
    config: RunConfig, files: Files, transitions: list[int], last: int, decay_start: int, decay_steps: int
) -> list[str]:
    """:param transitions: iterations at which the data changes.
    :param last: iteration at which all training ends.
    """
    target = config.target
    if not target.lr_warmup_steps < last:
        raise UserError(
            f"target.lr_warmup_steps is {target.lr_warmup_steps}, but training ends after {last} steps; lower it"
        )
    return [
        *_model(config),
        *_optimizer(config),
        *_schedule(config, [step for step in transitions if step > 0], last, decay_start, decay_steps),
        *_parallel_layout(config),
        *_checkpoints(config, files),
        *_data(config, files),
        *("--log-interval", str(target.log_interval), "--eval-iters", "0", "--eval-interval", str(last)),
        *("--seed", str(config.seed)),
        "--no-one-logger",  # reports to nobody but whom `tracking` names
        *target.extra_args,
    ]


def _model(config: RunConfig) -> list[str]:
    architecture, length = resolve(config.target.model), config.data.sequence_length
    if length > architecture.max_sequence_length:
        raise UserError(
            f"data.sequence_length is {length}, but {config.target.model.preset} is made for at most "
            f"{architecture.max_sequence_length} tokens; lower it"
        )
    vocab_size = config.data.tokenizer.vocab_size
    words = [*architecture.megatron_flags(), "--seq-length", str(length)]
    words += ["--vocab-size", str(vocab_size), "--padded-vocab-size", str(padded_vocab_size(vocab_size))]
    return [*words, "--bf16"] if config.target.model.bf16 else words


def _optimizer(config: RunConfig) -> list[str]:
    target = config.target
    batch = ["--micro-batch-size", str(target.micro_batch_size), "--global-batch-size", str(target.global_batch_size)]
    decay = ["--weight-decay", str(target.weight_decay), "--clip-grad", str(target.clip_grad)]
    return ["--optimizer", "adam", *_ADAM, *decay, *batch]


def _schedule(config: RunConfig, transitions: list[int], last: int, decay_start: int, decay_steps: int) -> list[str]:
    target = config.target

    def samples(steps: int) -> str:
        return str(steps * target.global_batch_size)

    words = ["--train-samples", samples(last), "--lr", str(target.lr), "--min-lr", str(target.min_lr)]
    words += ["--lr-warmup-samples", samples(target.lr_warmup_steps), "--lr-decay-style", "WSD"]
    words += ["--lr-wsd-decay-style", "linear", "--lr-wsd-decay-samples", samples(decay_steps)]
    words += ["--lr-decay-samples", samples(decay_start + decay_steps)]
    # a checkpoint keeps its place on the schedule; where the schedule ends is this process's to say
    words.append("--override-opt-param-scheduler")
    return [*words, "--phase-transition-iterations", ",".join(map(str, transitions))] if transitions else words


def _parallel_layout(config: RunConfig) -> list[str]:
    target = config.target
    words = ["--tensor-model-parallel-size", str(target.tensor_parallel)]
    words += ["--pipeline-model-parallel-size", str(target.pipeline_parallel)]
    words += ["--context-parallel-size", str(target.context_parallel)]
    return [*words, "--sequence-parallel"] if target.sequence_parallel else words


def _checkpoints(config: RunConfig, files: Files) -> list[str]:
    words = ["--ckpt-format", "torch_dist", "--save", str(files.save)]
    words += ["--save-interval", str(config.target.save_interval)]
    if files.load is not None:
        words += ["--load", str(files.load), "--exit-on-missing-checkpoint"]
    return words


def _data(config: RunConfig, files: Files) -> list[str]:
    tokenizer = config.data.tokenizer
    words = ["--tokenizer-type", tokenizer.type]
    if tokenizer.model is not None:
        words += ["--tokenizer-model", tokenizer.model]
    words += ["--per-split-data-args-path", str(files.data), "--data-cache-path", str(files.index_cache)]
    # every attention implementation here is causal of itself
    return [*words, "--no-create-attention-mask-in-dataloader"]
