"""`benchmark`: lm-evaluation-harness on a checkpoint of Megatron's trainer, beside our own reading of the same.

What needs the harness itself is marked `harness`: it is an optional package, `make test-harness` installs it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.config import read_saved_config, save_config
from megatron_bliss.errors import UserError
from megatron_bliss.orchestration import state
from megatron_bliss.stages import benchmark, inventory, select
from tests import launch
from tests.distributed import run_ranks
from tests.tiny_run import VOCAB_SIZE, tiny_config

NUM_DOCUMENTS = 60
TASK = """
task: next_number
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def documents() -> list[dict[str, Any]]:
    """The pool's walk goes on by one; the other choice is some number, of one to three digits."""
    found = []
    for index in range(NUM_DOCUMENTS):
        start = 4 * index + 3
        numbers = [str((start + place) % (VOCAB_SIZE - 1)) for place in range(9)]
        choices = [numbers[-1], str((start * 7 + 90) % (VOCAB_SIZE - 1))]
        found.append({"context": " ".join(numbers[:-1]), "choices": choices, "answer": 0})
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LLM that Megatron has warmed up, without a decay branch; TP 2."""
    folder = tmp_path_factory.mktemp("benchmark")
    run = folder / "run"
    config = read_saved_config(tiny_config(folder, control=False))
    config.warmup.target_steps, config.target.tensor_parallel = 12, 2
    config.launch.nproc_per_node = 2
    config.evaluation.decay_steps = 0
    state.prepare(config, run)
    inventory.run(run)
    select.run(run, None)
    launch.run("megatron_bliss.cli", ["warmup-target", "--run", run], folder / "warmup.log", num_ranks=2, timeout=600)
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "next.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents()))
    (tasks / "next.yaml").write_text(TASK.format(file=tasks / "next.jsonl"))
    return run


def measured(run: Path, tensor_parallel: int, ranks: int) -> dict[str, Any]:
    config = read_saved_config(RunPaths(run).config)
    config.target.tensor_parallel = tensor_parallel
    save_config(config, RunPaths(run).config)
    words = [str(run), str(run.parent / "tasks")]
    launch.run("tests.test_benchmark", words, run.parent / f"benchmark-{tensor_parallel}-{ranks}.log", ranks, 600)
    found: dict[str, Any] = json.loads((RunPaths(run).evaluation(0) / "benchmarks.json").read_text())
    return found


def own_accuracies(rank: int, run: Path) -> dict[str, float]:
    """`acc` and `acc_norm` by this project's own model, in float32."""
    from megatron_bliss.mcore import checkpoints, parallel
    from megatron_bliss.mcore.batches import make_batch
    from megatron_bliss.mcore.models import token_losses

    config = read_saved_config(RunPaths(run).config)
    context = parallel.initialize(1, False, seed=1)
    model = checkpoints.load_target(RunPaths(run).warmup_target, context, config.target.model, VOCAB_SIZE)
    right = {"acc": 0, "acc_norm": 0}
    for document in documents():
        likelihoods = []
        for choice in document["choices"]:
            tokens = [int(word) for word in f"{document['context']} {choice}".split()]
            with torch.no_grad():
                likelihoods.append(-float(token_losses(model, make_batch([tokens], context.device))[0, -1]))
        by_length = [value / len(choice) for value, choice in zip(likelihoods, document["choices"], strict=True)]
        right["acc"] += likelihoods[0] > likelihoods[1]
        right["acc_norm"] += by_length[0] > by_length[1]
    return {name: count / NUM_DOCUMENTS for name, count in right.items()}


@pytest.mark.harness
def test_the_harness_finds_what_our_own_model_says_at_every_layout(run: Path) -> None:
    """Within three documents of 60: the harness computes in bfloat16."""
    [expected] = run_ranks(own_accuracies, 1, run, timeout=600)
    assert expected["acc"] > 0.6  # the choices differ, so that a harness that reads other tokens would be seen
    for tensor_parallel, ranks in ((2, 2), (1, 2), (1, 1)):
        content = measured(run, tensor_parallel, ranks)
        assert (content["schema"], content["iteration"], content["num_fewshot"]) == (1, 12, 0)
        task = content["tasks"]["next_number"]
        assert task["documents"] == NUM_DOCUMENTS
        for name, value in expected.items():
            assert task[name] == pytest.approx(value, abs=3 / NUM_DOCUMENTS), (tensor_parallel, ranks)
            deviation = (task[name] * (1 - task[name]) / (NUM_DOCUMENTS - 1)) ** 0.5
            assert task[f"{name}_stderr"] == pytest.approx(deviation, rel=1e-6)


@pytest.mark.harness
def test_unknown_tasks_and_data_that_are_not_here_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(UserError, match="no task 'juggling'"):
        benchmark.prefetch(["juggling"], None)
    (tmp_path / "next.yaml").write_text(TASK.format(file=tmp_path / "nowhere.jsonl"))
    with pytest.raises(UserError, match=r"data of task 'next_number' cannot be read .*--prefetch"):
        benchmark.prefetch(["next_number"], tmp_path)
    (tmp_path / "nowhere.jsonl").write_text(json.dumps(documents()[0]) + "\n")
    benchmark.prefetch(["next_number"], tmp_path)
    from lm_eval.tasks import TaskManager

    assert set(benchmark.TASKS) <= set(TaskManager().all_tasks)


def test_figures_are_the_harness_s_own_by_plain_names() -> None:
    results = {
        "sciq": {"alias": "sciq", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25},
        "boolq": {"acc,none": 1.0, "acc_stderr,none": "N/A", "f1,none": 0.3},
        "mmlu": {"alias": "mmlu", "acc,none": 0.25, "acc_stderr,none": 0.01},  # a group: it has no documents of its own
    }
    samples = {"sciq": {"original": 9, "effective": 4}, "boolq": {"original": 2, "effective": 2}}
    assert benchmark.figures(results, samples) == {
        "sciq": {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.25, "documents": 4},
        "boolq": {"acc": 1.0, "documents": 2},
        "mmlu": {"acc": 0.25, "acc_stderr": 0.01, "documents": None},
    }


def test_what_cannot_be_measured_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tensor_parallel, ranks in ((1, 1), (1, 8), (8, 8)):
        benchmark.check_ranks(tensor_parallel, ranks)
    with pytest.raises(UserError, match="start it with 2 ranks"):
        benchmark.check_ranks(2, 4)
    config = read_saved_config(tiny_config(tmp_path, control=False))
    state.prepare(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"decay/iter_0000015 does not exist; run `megatron-bliss evaluate"):
        benchmark.measured_checkpoint(RunPaths(tmp_path / "run"), config, 1)
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install \"megatron-bliss\[eval\]\""):
        benchmark.prefetch(["sciq"], None)


if __name__ == "__main__":
    benchmark.run(Path(sys.argv[1]), 0, ["next_number"], Path(sys.argv[2]), None)
