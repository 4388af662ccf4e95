"""Padding, windows and buckets; which kernels are chosen; the log of metrics; the runner of ranks."""

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_bliss.mcore.batches import bucket, cut_windows, drawn_windows, make_batch, mean_losses, padded_length
from megatron_bliss.progress import MetricsLog
from tests.distributed import run_ranks
from tests.hanging_ranks import fail, hang

CPU = torch.device("cpu")


def test_a_batch_predicts_every_token_but_the_first() -> None:
    batch = make_batch([np.array([5, 6, 7]), np.array([9]), np.array([1, 2, 3, 4, 8])], CPU, multiple=3)
    assert batch.tokens.tolist() == [[5, 6, 0, 0, 0, 0], [0] * 6, [1, 2, 3, 4, 0, 0]]
    assert batch.labels.tolist() == [[6, 7, 0, 0, 0, 0], [0] * 6, [2, 3, 4, 8, 0, 0]]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 0, 0, 0], [0] * 6, [1, 1, 1, 1, 0, 0]]
    assert batch.lengths.tolist() == [2, 0, 4]
    losses = torch.arange(18.0).reshape(3, 6)
    assert mean_losses(losses, batch).tolist() == [0.5, 0.0, 13.5]


def test_a_loss_mask_belongs_to_the_predicted_token() -> None:
    batch = make_batch([np.array([5, 6, 7, 8])], CPU, loss_masks=[np.array([True, False, False, True])])
    assert batch.loss_mask.tolist() == [[0, 0, 1]]


@given(st.integers(0, 200), st.integers(1, 40))
def test_windows_predict_every_token_once(length: int, sequence_length: int) -> None:
    predicted = [token for start, stop in cut_windows(length, sequence_length) for token in range(start + 1, stop)]
    assert predicted == list(range(1, length))
    assert all(stop - start <= sequence_length + 1 for start, stop in cut_windows(length, sequence_length))
    assert len(cut_windows(length, sequence_length)) >= 1


def test_which_window_is_drawn_depends_on_the_place_alone() -> None:
    lengths = [0, 1, 9, *[50] * 200]
    drawn = drawn_windows(lengths, 8, seed=3)
    windows = [cut_windows(length, 8) for length in lengths]
    assert all((one.start, one.stop) in of for one, of in zip(drawn, windows, strict=True))
    assert drawn_windows(np.array(lengths[5:]), 8, seed=3, first=5) == drawn[5:]
    assert {(one.start, one.stop) for one in drawn[3:]} == set(windows[3])
    assert drawn_windows(lengths, 8, seed=4) != drawn


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 200), st.integers(1, 4))
def test_buckets_hold_every_sequence_once_within_the_budget(lengths: list[int], budget: int, multiple: int) -> None:
    batches = bucket(np.array(lengths, dtype=np.int64), budget, multiple)
    assert sorted(i for batch in batches for i in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        width = padded_length(max(lengths[i] for i in batch), multiple)
        assert len(batch) == 1 or width * len(batch) <= budget


def test_buckets_of_mixed_lengths_pad_little() -> None:
    lengths = np.random.default_rng(0).integers(1, 1025, 4000)
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in bucket(lengths, 16_384))
    assert padded < 1.02 * lengths.sum()


class _Numbers:
    """Sequences of given lengths, token ids counting up through all of them; every third token is not predicted."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths)
        self._ends = np.cumsum(lengths)

    def get(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.arange(self._ends[index] - self.lengths[index], self._ends[index])
        return tokens, tokens % 3 != 0


@pytest.mark.parametrize(("sequence_length", "batch_tokens"), [(4, 8), (7, 1), (100, 1000)])
def test_what_is_measured_on_windows_adds_up(sequence_length: int, batch_tokens: int) -> None:
    from megatron_bliss.mcore.scorer import Pass, mean, means

    context: Any = SimpleNamespace(device=CPU, length_multiple=1, dp_rank=0, dp_size=1)
    sequences = _Numbers([1, 9, 30, 0, 5, 8])
    seen = []
    totals = Pass(context, sequence_length, batch_tokens).totals(
        lambda batch: torch.stack([(batch.labels * batch.loss_mask).sum(1), batch.loss_mask.sum(1)], dim=1),
        sequences,
        lambda done, padded: seen.append((done, padded)),
    )
    labels = [[t for t in sequences.get(i)[0][1:].tolist() if t % 3] for i in range(6)]
    assert totals.tolist() == [[sum(row), len(row)] for row in labels]
    assert means(totals).tolist() == [np.float32(sum(row) / max(len(row), 1)) for row in labels]
    assert mean(totals) == pytest.approx(sum(map(sum, labels)) / sum(map(len, labels)))
    assert mean(totals[:1]) is None
    assert seen[-1][0] == 8 + 29 + 4 + 7
    assert seen[-1][1] >= seen[-1][0]


def test_sequences_without_a_prediction_score_lowest() -> None:
    from megatron_bliss.methods.perplexity import Perplexity
    from megatron_bliss.stages.score import lowest_where_nothing_is_predicted

    losses, lengths = np.array([0.0, 5.0, 2.0], dtype=np.float32), np.array([1, 9, 2])
    for keep in ("low", "middle", "high"):
        method = Perplexity(keep)
        scores = lowest_where_nothing_is_predicted(method.from_output(losses), lengths)
        assert scores.dtype == np.float32
        assert scores[1:].tolist() == method.from_output(losses)[1:].tolist()
        finished = method.compared(scores, np.float32(np.median(scores)))
        assert np.isfinite(finished).all()
        assert finished.argmin() == 0


def test_kernels_are_what_can_be_imported_on_a_gpu() -> None:
    from megatron_bliss.mcore.kernels import choose_kernels

    softmax = "scaled_upper_triang_masked_softmax_cuda"
    engine, apex = "transformer_engine.pytorch", "apex.normalization.fused_layer_norm"

    def choice(on_gpu: bool, *there: str) -> tuple[bool, ...]:
        kernels = choose_kernels(on_gpu, lambda module: module in there)
        return kernels.transformer_engine, kernels.apex_norm, kernels.fused_softmax, kernels.fused_activation

    assert choice(False, engine, apex, softmax) == (False, False, False, False)
    assert choice(True) == (False, False, False, True)
    assert choice(True, apex, softmax) == (False, True, True, True)
    assert choice(True, engine, apex, softmax) == (True, False, False, True)


@pytest.mark.parametrize("preset", ["tiny", "llama-0.5b"])
def test_chosen_kernels_reach_megatrons_configuration(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.fusions.fused_layer_norm import FusedLayerNorm

    from megatron_bliss.config import ModelConfig
    from megatron_bliss.mcore import models
    from megatron_bliss.mcore.architectures import resolve
    from megatron_bliss.mcore.kernels import PLAIN

    architecture = resolve(ModelConfig(preset=preset))
    context: Any = SimpleNamespace(tp_size=2, pp_rank=0, pp_size=1, is_last_stage=True, sequence_parallel=True)
    kernels = replace(PLAIN, apex_norm=True, fused_softmax=True, fused_activation=True)
    config = models.transformer_config(architecture, kernels, True, context, recompute=True)
    assert config.masked_softmax_fusion
    assert config.bias_activation_fusion
    assert not config.gradient_accumulation_fusion
    assert (config.hidden_dropout, config.attention_dropout) == (0.0, 0.0)
    assert (config.recompute_granularity, config.params_dtype) == ("full", torch.bfloat16)
    spec = models.layer_spec(config, kernels)
    # Apex has no RMSNorm
    assert spec.layer_norm is (FusedLayerNorm if preset == "tiny" else models.torch_norm)
    assert spec.layer_specs[0].submodules.input_layernorm is spec.layer_norm
    monkeypatch.setattr(models, "get_gpt_layer_with_transformer_engine_spec", lambda: "transformer engine")
    engine = replace(PLAIN, transformer_engine=True, fused_activation=True, fused_weight_gradient=True)
    assert models.layer_spec(config, engine) == "transformer engine"
    monkeypatch.setattr(models, "kernels_in_use", lambda: engine)
    chosen, plain = (
        models.gpt_arguments(ModelConfig(preset=preset), 100, context, plain_kernels=is_plain)["config"]
        for is_plain in (False, True)
    )
    assert (chosen.transformer_impl, plain.transformer_impl) == ("transformer_engine", "local")
    assert not plain.bias_activation_fusion
    norm = models.torch_norm(config, 8)
    assert all(parameter.sequence_parallel for parameter in norm.parameters())  # type: ignore[attr-defined]


def test_a_resumed_log_drops_what_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "stage" / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3):
        log.write(step, loss=float(step))
    with open(path, "a") as stream:
        stream.write('{"schema": 1, "st')  # killed while writing
    MetricsLog(path, done=2).write(3, loss=float("nan"))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"schema": 1, "step": 1, "loss": 1.0},
        {"schema": 1, "step": 2, "loss": 2.0},
        {"schema": 1, "step": 3, "loss": None},
    ]


def test_hanging_and_failing_ranks_are_killed_and_named() -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"ranks \[1\] hung"):
        run_ranks(hang, 2, timeout=3)
    with pytest.raises(AssertionError, match=r"rank 1 failed:[\s\S]*rank one is broken"):
        run_ranks(fail, 2, timeout=60)
    assert time.monotonic() - began < 60
