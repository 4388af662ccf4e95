"""A stage that counts steps, keeps them in a file, stops when it is asked to, and writes its outputs at the end.

`python -m tests.slurm.fake_stage … megatron_bliss.cli STAGE --run DIR …`. What it does is in DIR/behaviour.json:
{"seconds": {STAGE: of a step}, "steps": {STAGE: number}, "codes": {STAGE: [exit code of each attempt, 0 to go on]},
"deaf": [STAGES that do not stop when asked], "hangs": [STAGES that do nothing at first]}. A stage `pretrain` in it
is every round's.
"""

import json
import os
import sys
import time
from pathlib import Path

from megatron_bliss.orchestration import slurm_job


def main(words: list[str]) -> int:
    run_dir, stage = slurm_job.find(words[words.index("megatron_bliss.cli") + 1 :])
    behaviour = json.loads((run_dir / "behaviour.json").read_text())

    def told(what: str, default: float) -> float:
        table = behaviour.get(what, {})
        return table.get(stage.name, table.get(stage.command[0], default))

    folder = run_dir / "fake" / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    attempt, counter = len(list(folder.glob("attempt-*"))), folder / "steps"
    (folder / f"attempt-{attempt}-{time.time():.2f}").touch()
    if attempt == 0 and stage.name in behaviour.get("hangs", ()):
        time.sleep(1000)
    codes = behaviour.get("codes", {}).get(stage.name, [])
    if code := codes[attempt] if attempt < len(codes) else 0:
        print("error: data.pool is of cheese; make it of text" if code == 2 else "it went wrong", flush=True)
        return code
    steps, total = int(counter.read_text()) if counter.exists() else 0, int(told("steps", 1))
    first = stage.iterations[0] if stage.iterations else 0  # Megatron counts through all rounds
    while steps < total:
        time.sleep(told("seconds", 0))
        steps += 1
        counter.write_text(str(steps))
        print(f"[{stage.command[0]}] {first + steps}/{first + total} steps", flush=True)
        asked = Path(os.environ["MEGATRON_BLISS_STOP_FILE"]).exists()
        asked |= time.time() > float(os.environ.get("MEGATRON_BLISS_STOP_AT") or "inf")
        if asked and stage.name not in behaviour.get("deaf", ()) and steps < total:
            return 3
    for output in stage.outputs:
        path = output if output.suffix else output / "manifest.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(stage.name)
    (folder / f"end-{time.time():.2f}").touch()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
