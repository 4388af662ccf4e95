"""A node of several with fake stages: `python -m tests.fake_node CONFIG RUN BEHAVIOUR RANK`, of two.

A distributed stage is `NAME` on the first node, where it waits for the other's part, and `NAME@1` on the other.
"""

import json
import sys
from pathlib import Path

from megatron_bliss import cli
from megatron_bliss.config import read_saved_config
from megatron_bliss.orchestration import local, nodes
from megatron_bliss.orchestration.plan import Stage
from tests.fake_run import fake_command

_LOST_AFTER, _BEAT_INTERVAL = 4.0, 0.5


def main() -> None:
    config, run_dir = read_saved_config(Path(sys.argv[1])), Path(sys.argv[2])
    behaviour, rank = json.loads(sys.argv[3]), int(sys.argv[4])

    def command(self: nodes.Nodes, stage: Stage, port: int) -> list[str]:
        parts = [stage.name, f"{stage.name}@1"]
        words = fake_command(behaviour | {"meet": parts, "port": port})(stage)
        return words if self.rank == 0 else [*words[:3], parts[1], words[4]]

    nodes.Nodes.command = command  # type: ignore[method-assign]
    nodes.stage_command = fake_command(behaviour)
    nodes._LOST_AFTER, nodes._BEAT_INTERVAL = _LOST_AFTER, _BEAT_INTERVAL
    local._POLL_INTERVAL = 0.05
    work = nodes.follow if rank else nodes.lead
    cli.app = lambda: work(config, run_dir, nodes.Nodes(2, rank, "127.0.0.1", 29500))  # type: ignore[assignment]
    cli.main()


if __name__ == "__main__":
    main()
