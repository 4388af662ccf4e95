"""Run the demo once a seed and gather the speed-up over random with its spread in build/demo-seeds.json."""

import argparse
import json
import statistics
from pathlib import Path

from megatron_bliss.artifacts import write_json
from megatron_bliss.demo import Experiment, run
from megatron_bliss.errors import user_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("build/demo-seeds"), help="folder of the runs")
    arguments = parser.parse_args()
    results = []
    for seed in arguments.seeds:
        folder = arguments.out / f"seed-{seed}"
        run(Experiment(seed=seed, out=folder))
        results.append(json.loads((folder / "result.json").read_text()))
    speedups = [result["speedup_over_random"] for result in results]
    summary = {
        "schema": 1,
        "seeds": arguments.seeds,
        "speedup_over_random": speedups,
        "speedup_is_lower_bound": [result["speedup_is_lower_bound"] for result in results],
        "mean": statistics.mean(speedups),
        "standard_deviation": statistics.stdev(speedups) if len(speedups) > 1 else 0.0,
        "auc_target_domain": [result["auc_target_domain"] for result in results],
        "test_loss": {
            arm: [result["arms"][arm]["test_loss"] for result in results] for arm in results[0]["arms"]
        },
        "wall_s": [result["wall_s"] for result in results],
    }  # fmt: skip
    path = arguments.out.parent / "demo-seeds.json"
    write_json(path, summary)
    print(json.dumps(summary, indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    with user_errors():
        main()
