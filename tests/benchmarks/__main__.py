"""`python -m tests.benchmarks [NAME]`: run all benchmarks of this folder, or one.

A benchmark is a module bench_NAME.py whose `measure()` returns a dictionary of results; `table(results)` shows them.
"""

import argparse
import importlib
import os
import platform
import sys
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from megatron_bliss.artifacts import write_json

FOLDER = Path(__file__).parent


def names() -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))


def machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "python": platform.python_version(),
    }


def show(name: str, results: dict[str, Any]) -> None:
    """One line a result; nested results are indented."""
    table = Table(title=name, show_header=False)

    def add(part: dict[str, Any], depth: int) -> None:
        for key, value in part.items():
            if isinstance(value, dict):
                table.add_row("  " * depth + key, "")
                add(value, depth + 1)
            else:
                table.add_row("  " * depth + key, f"{value:.4g}" if isinstance(value, float) else str(value))

    add(results, 0)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", choices=names(), help="run this one only")
    wanted = parser.parse_args().name
    for name in [wanted] if wanted else names():
        results = importlib.import_module(f"tests.benchmarks.bench_{name}").measure()
        show(name, results)
        path = Path("build/bench") / f"{name}.json"
        command = f"make bench NAME={name}"
        write_json(path, {"schema": 1, "name": name, "command": command, "machine": machine(), "results": results})
        print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
