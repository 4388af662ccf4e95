"""A launcher that runs a real plan with fake stages: `python -m tests.fake_run CONFIG RUN BEHAVIOUR`, to be killed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_bliss.config import (
    ControlConfig,
    DataConfig,
    DomainConfig,
    LaunchConfig,
    RunConfig,
    TokenizerConfig,
    read_saved_config,
)
from megatron_bliss.errors import StageError, StoppedError, user_errors
from megatron_bliss.orchestration import local
from megatron_bliss.orchestration.plan import Stage

POLL_INTERVAL = 0.02  # seconds, of the launcher
_STAGE = str(Path(__file__).with_name("fake_stage.py"))


def fake_config(**changes: Any) -> RunConfig:
    """Settings whose data does not exist; no fake stage looks for it."""
    settings: dict[str, Any] = {
        "rounds": 2,
        "round_steps": 6,
        "data": DataConfig(
            pool=[DomainConfig("walk", ["/nowhere/walk"])],
            validation="/nowhere/valid",
            tokenizer=TokenizerConfig(vocab_size=256),
        ),
        "launch": LaunchConfig(concurrency=2),
        "controls": [ControlConfig(name="random", method="random", steps_factor=2)],
    }
    return RunConfig(**settings | changes)


def fake_command(behaviour: dict[str, Any]) -> Callable[[Stage], list[str]]:
    """See `fake_stage`; stages in `torchrun` are started as two ranks."""

    def command(stage: Stage) -> list[str]:
        launcher = [sys.executable, "-S", _STAGE]
        words = [stage.name, json.dumps(behaviour), *map(str, stage.outputs)]
        if stage.name in behaviour.get("torchrun", ()):
            launcher = [*local.module_launcher(2), "tests.fake_stage"]
            words += ["--run", "x"]  # real stages have it
        return [*launcher, *words]

    return command


def journal(path: Path) -> list[tuple[str, str, int]]:
    """(begin | end, stage, pid) in the order in which they were written."""
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [(event, name, int(pid)) for event, name, pid, _ in lines]


def main() -> None:
    local._POLL_INTERVAL = POLL_INTERVAL
    config, run_dir, behaviour = read_saved_config(Path(sys.argv[1])), Path(sys.argv[2]), json.loads(sys.argv[3])
    with user_errors():
        try:
            local.run(config, run_dir, command=fake_command(behaviour))
        except StageError as error:
            print(error, file=sys.stderr)
            raise SystemExit(1) from None
        except StoppedError as error:
            print(error, file=sys.stderr)
            raise SystemExit(3) from None


if __name__ == "__main__":
    main()
