"""A stage that only sleeps and writes its outputs: `python tests/fake_stage.py NAME BEHAVIOUR OUTPUT…`.

BEHAVIOUR is JSON: {"journal": FILE, "seconds": 0.2, "lengths": {COMMAND: seconds instead}, "fail": {NAME: exit code},
"meet": [NAMES that await each other], "listens": [NAMES that do nothing but stop when asked to], "stops": {NAME: times
that it stops without being asked}}.
The journal gets `begin NAME PID TIME` and `end NAME PID TIME`. It imports little, for tests start it a hundred times.
"""

import json
import os
import signal
import sys
import time


def _note(journal: str, event: str, name: str) -> None:
    with open(journal, "a") as stream:
        stream.write(f"{event} {name} {os.getpid()} {time.time()}\n")


def _count(journal: str, event: str, name: str) -> int:
    with open(journal) as stream:
        return sum(line.split()[:2] == [event, name] for line in stream)


def _meet(journal: str, others: list[str]) -> None:
    for _ in range(1000):
        with open(journal) as stream:
            begun = {line.split()[1] for line in stream}
        if begun.issuperset(others):
            return
        time.sleep(0.01)
    raise SystemExit("the others did not come")


def main(name: str, behaviour: str, *outputs: str) -> None:
    wanted = json.loads(behaviour)
    _note(wanted["journal"], "begin", name)
    if name in wanted.get("meet", ()):
        _meet(wanted["journal"], wanted["meet"])
    print(f"[{name.rpartition('/')[2]}] 5/10 steps | 1.2k tokens/s | ETA 0:00:01 | loss 3.5", flush=True)
    if name in wanted.get("listens", ()):
        signal.signal(signal.SIGTERM, lambda *_: None)
        while not os.path.exists(os.environ["MEGATRON_BLISS_STOP_FILE"]):
            time.sleep(0.02)
        _note(wanted["journal"], "stop", name)
        raise SystemExit(3)
    if _count(wanted["journal"], "stop", name) < wanted.get("stops", {}).get(name, 0):
        _note(wanted["journal"], "stop", name)
        raise SystemExit(3)
    time.sleep(wanted.get("lengths", {}).get(name.rpartition("/")[2], wanted.get("seconds", 0)))
    if exit_code := wanted.get("fail", {}).get(name):
        print("error: data.pool is of cheese; make it of text" if exit_code == 2 else "it went wrong", file=sys.stderr)
        raise SystemExit(exit_code)
    print(f"[{name.rpartition('/')[2]}] 10/10 steps | loss 2.5", flush=True)
    for output in outputs:
        path = output if os.path.splitext(output)[1] else f"{output}/manifest.json"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as stream:
            stream.write(name)
    _note(wanted["journal"], "end", name)


if __name__ == "__main__":
    if "RANK" in os.environ:
        from megatron_bliss.orchestration.bound import die_with_parent

        die_with_parent()
    main(*sys.argv[1:])
