"""`benchmark`: a round's checkpoint on downstream tasks, by lm-evaluation-harness and its own backend for Megatron.

The harness runs the LLM in bfloat16, zero-shot, under tensor parallelism, or on several ranks that share out the texts.
It has no pipelines; a checkpoint of a pipelined training is read without one. Nothing is downloaded: `prefetch` does
that, where there is a network.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bliss.artifacts import RunPaths, digest_tree, write_json
from megatron_bliss.config import RunConfig, read_saved_config
from megatron_bliss.errors import UserError
from megatron_bliss.mcore import platform
from megatron_bliss.mcore.architectures import padded_vocab_size
from megatron_bliss.mcore.checkpoint_files import find, iteration_path
from megatron_bliss.mcore.script import describe_single_process
from megatron_bliss.stages.pretrain import line_and_selection

# What the papers of BLISS and MATES measure, by the harness's names.
TASKS = (
    *("sciq", "arc_easy", "arc_challenge", "logiqa", "openbookqa"),
    *("boolq", "hellaswag", "piqa", "winogrande"),
)
METRICS = ("acc", "acc_norm")


def prefetch(tasks: Sequence[str], task_files: Path | None) -> None:
    """Download the tasks' data into Hugging Face's cache (HF_HOME), for nodes without a network.

    :raises UserError: for an unknown task, or one whose data cannot be had.
    """
    _quieten(offline=False)
    for name in tasks:
        _load([name], task_files)
        print(f"[benchmark] {name} is here", flush=True)


def run(run_dir: Path, round_number: int, tasks: Sequence[str], task_files: Path | None, limit: int | None) -> None:
    """Write `round-N/evaluation/benchmarks.json`. All ranks of the job call it.

    :param task_files: a directory of the harness's task files (YAML) beside its own.
    :param limit: documents of each task at most.
    :raises UserError: without the harness, the checkpoint that `evaluate` leaves or a task's data, or where the number
        of ranks is not one that the harness can use.
    """
    paths = RunPaths(Path(run_dir))
    config = read_saved_config(paths.config)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    check_ranks(config.target.tensor_parallel, ranks)
    directory, iteration = measured_checkpoint(paths, config, round_number)
    _quieten(offline=True)
    loaded = _load(tasks, task_files)
    describe_single_process()
    platform.install()
    model = _model(config, directory, iteration, ranks)

    import lm_eval

    found = lm_eval.simple_evaluate(
        model, tasks=loaded, num_fewshot=0, limit=limit, log_samples=False, random_seed=config.seed
    )
    if found is None or os.environ.get("RANK", "0") != "0":
        return
    content = {
        "schema": 1,
        "iteration": iteration,
        "checkpoint": digest_tree(iteration_path(directory, iteration)),
        "harness": metadata.version("lm-eval"),
        "num_fewshot": 0,
        "limit": limit,
    }
    results = figures(found["results"], found["n-samples"])
    write_json(paths.evaluation(round_number) / "benchmarks.json", content | {"tasks": results})
    for name, task in results.items():
        shown = " | ".join(f"{metric} {task[metric]:.4g}" for metric in METRICS if metric in task)
        print(f"[benchmark] {name} | {shown}", flush=True)


def check_ranks(tensor_parallel: int, ranks: int) -> None:
    """:raises UserError: if the harness cannot use so many."""
    if tensor_parallel not in (1, ranks):
        raise UserError(
            f"target.tensor_parallel is {tensor_parallel} and benchmark has {ranks} ranks: the harness runs either one "
            f"model over all ranks or a whole one on each; start it with {tensor_parallel} ranks"
        )


def measured_checkpoint(paths: RunPaths, config: RunConfig, round_number: int) -> tuple[Path, int]:
    """Directory and iteration of what `evaluate` measures: the end of the decay branch.

    :raises UserError: if it is not there.
    """
    end = config.round_end(round_number)
    directory, _ = line_and_selection(paths, round_number)
    if config.evaluation.decay_steps:
        directory, end = paths.evaluation(round_number) / "decay", end + config.evaluation.decay_steps
    if not iteration_path(directory, end).is_dir():
        raise UserError(
            f"{iteration_path(directory, end)} does not exist; run `megatron-bliss evaluate --run {paths.root} "
            f"--round {round_number}` first"
        )
    find(iteration_path(directory, end))
    return directory, end


def figures(results: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """What the harness says of each task or group of tasks: `acc`, `acc_norm` where it has one, their standard errors,
    and the number of documents; None for a group, whose tasks are listed as well."""
    found: dict[str, Any] = {}
    for task, values in results.items():
        known = {f"{metric}{end}": values.get(f"{metric}{end},none") for metric in METRICS for end in ("", "_stderr")}
        numbers = {name: float(value) for name, value in known.items() if isinstance(value, int | float)}
        finite = {name: value for name, value in numbers.items() if np.isfinite(value)}
        found[task] = finite | {"documents": samples[task]["effective"] if task in samples else None}
    return found


def _quieten(offline: bool) -> None:
    """:raises UserError: if the harness is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError('benchmark needs lm-evaluation-harness; pip install "megatron-bliss[eval]"')
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if offline:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")


def _load(tasks: Sequence[str], task_files: Path | None) -> list[Any]:
    """The harness's task objects, their data read.

    :raises UserError: for one that is not known, or whose data are not here.
    """
    from lm_eval.tasks import TaskManager, get_task_dict

    if task_files is not None and not task_files.is_dir():
        raise UserError(f"--task-files {task_files} is not a directory; give the one that holds the tasks' YAML files")
    manager = TaskManager(include_path=None if task_files is None else str(task_files.absolute()))
    for name in tasks:
        if name not in manager.all_tasks:
            raise UserError(f"the harness has no task {name!r}; `lm-eval ls tasks` lists them, --task-files adds some")
    loaded = []
    for name in tasks:
        try:
            loaded += get_task_dict([name], manager).values()
        except Exception as error:  # of the hub, of `datasets`, of a dataset's own code
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"the data of task {name!r} cannot be read ({reason}); run `megatron-bliss benchmark --prefetch "
                f"--tasks {name}` where there is a network, with the same HF_HOME"
            ) from None
    return loaded


def _model(config: RunConfig, directory: Path, iteration: int, ranks: int) -> Any:
    """The checkpoint in the harness's own backend."""
    core = find_spec("megatron.core")
    assert core is not None
    assert core.submodule_search_locations is not None
    # the harness puts it at the head of the path, and refuses to start without it
    os.environ["MEGATRON_PATH"] = str(Path(core.submodule_search_locations[0]).parents[1])
    from lm_eval.models.megatron_lm import MegatronLMEval

    tokenizer = config.data.tokenizer
    words = ["--vocab-size", str(tokenizer.vocab_size), "--no-one-logger"]
    words += ["--padded-vocab-size", str(padded_vocab_size(tokenizer.vocab_size))]
    return MegatronLMEval(
        load=str(directory),
        ckpt_step=iteration,
        tokenizer_type=tokenizer.type,
        tokenizer_model=tokenizer.model,
        devices=ranks,
        tensor_model_parallel_size=config.target.tensor_parallel,
        seq_length=config.data.sequence_length,
        micro_batch_size=config.target.micro_batch_size,
        extra_args=shlex.join([*words, *platform.training_flags()]),
    )
