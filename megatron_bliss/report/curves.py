"""Long curves as a few hundred points: columns of numbers, each the mean over as many steps as fall on it."""

from collections.abc import Mapping, Sequence

import numpy as np

_POINTS = 200  # of a curve, at most

Columns = dict[str, list[float | None]]  # "step", and a column a quantity; None where there is no number


def columns(lines: Sequence[Mapping[str, float]], limit: int = _POINTS) -> Columns:
    """Lines of a metrics.jsonl, in order; where there are more than `limit`, means over equally many lines each.

    A point's step is that of the last line in it.
    """
    names = [name for name in dict.fromkeys(key for line in lines for key in line) if name not in ("step", "schema")]
    per_point = -(-len(lines) // limit) if lines else 1
    found: Columns = {name: [] for name in ("step", *names)}
    for start in range(0, len(lines), per_point):
        part = lines[start : start + per_point]
        found["step"].append(part[-1]["step"])
        for name in names:
            values = [line[name] for line in part if name in line]
            found[name].append(float(np.mean(values)) if values else None)
    return found
