"""A rank's work for tests/test_guards.py: rounds whose score model is good, collapsed and diverged."""

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_bliss.artifacts import RunPaths, read_json
from megatron_bliss.config import read_saved_config
from megatron_bliss.data.scores import ScoreFiles
from megatron_bliss.data.selection import Selection
from megatron_bliss.errors import StageError, UserError
from megatron_bliss.mcore import checkpoints, parallel
from megatron_bliss.mcore.score_model import build_score_model
from megatron_bliss.stages import bilevel, score, select
from tests.side_models import edit_config, save_score_model


def save_round(run: Path, number: int, bias: float) -> None:
    """A score model that gives every sequence the same score."""
    config = read_saved_config(RunPaths(run).config)
    context = parallel.initialize(1, False, seed=4)
    model = build_score_model(config.proxy.model, config.data.tokenizer.vocab_size, context)  # its head is zero
    with torch.no_grad():
        model.score_head.bias.fill_(bias)
    checkpoints.save(RunPaths(run).bilevel(number), 1, {checkpoints.SCORE: model}, {}, {})


def outcome(action: Any, *arguments: Any) -> str:
    """What is printed and, if it comes to that, the error."""
    stream = io.StringIO()
    try:
        with contextlib.redirect_stdout(stream):
            action(*arguments)
    except (StageError, UserError) as error:
        return f"{stream.getvalue()}{type(error).__name__}: {error}"
    return stream.getvalue()


def rolled_back(rank: int, run: Path) -> dict[str, Any]:
    """Round 1 is good, round 2 collapsed, round 3 not a number: what comes of it with each action."""
    paths = RunPaths(run)
    save_score_model(run)
    save_round(run, 2, 0.25)
    found: dict[str, Any] = {"good": outcome(score.run, run, 1)}
    found["good guard"] = paths.guard(1).exists()
    found["none"] = outcome(score.run, run, 2)
    found["none guard"] = paths.guard(2).exists()
    edit_config(run, guards__action="stop")
    found["stop"] = outcome(score.run, run, 2)
    found["stopped select"] = outcome(select.run, run, 2)
    edit_config(run, guards__action="rollback")
    found["rollback"] = outcome(score.run, run, 2)
    found["rollback guard"] = read_json(paths.guard(2))
    found["rollback select"] = outcome(select.run, run, 2)
    found["manifest"] = Selection.open(paths.selection(2)).manifest
    found["rollback scores"], found["own scores"] = (
        np.concatenate([np.load(path) for path in sorted(directory.glob("*.npy"))])
        for directory in (paths.rollback_scores(2), paths.scores(2))
    )
    models = [ScoreFiles(directory).model_digest for directory in (paths.scores(1), paths.rollback_scores(2))]
    found["same model"] = models[0] == models[1]
    config = read_saved_config(paths.config)
    found["next starts from"] = bilevel.earlier_score_model(paths, config, 3)
    save_round(run, 3, float("nan"))
    found["again"] = outcome(score.run, run, 3)
    found["again guard"] = read_json(paths.guard(3))
    edit_config(run, guards__action="none")
    shutil.rmtree(paths.scores(3))
    found["nan without an action"] = outcome(score.run, run, 3)
    return found
