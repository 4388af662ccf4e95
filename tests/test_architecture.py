"""Imports point down only, and each package imports only what it may (docs/architecture.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_bliss"
# From the bottom up. Whatever stands in the package and is not listed here (cli, hooks.py, ...) is at the top.
LAYERS = [
    ("errors", "stopping", "wording"),
    ("artifacts", "settings_check"),
    ("config", "progress"),
    ("tracking",),
    ("data",),
    ("bilevel",),
    ("mcore",),
    ("methods",),
    ("stages",),
    ("orchestration",),
    ("inspection",),
    ("report",),
    ("doctor",),
]
# Third-party packages that only some parts may import.
ALLOWED = {
    "megatron": {"mcore"},
    "torch": {"bilevel", "mcore", "stages", "doctor", "tracking"},
}
# Pairs that the order of layers would allow.
FORBIDDEN = {
    ("methods", "mcore"),
    ("methods", "bilevel"),
    ("report", "mcore"),
    ("report", "bilevel"),
    ("orchestration", "bilevel"),
}


def layer(part: str) -> int:
    return next((rank for rank, names in enumerate(LAYERS) if part in names), len(LAYERS))


def imports(source: str, module: str) -> Iterator[str]:
    """Dotted names that a module imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(source: str, module: str) -> list[str]:
    """What a module, named `megatron_bliss.part.file`, imports against the rules."""
    part = module.split(".")[1]
    found = []
    for name in imports(source, module):
        top, _, rest = name.partition(".")
        if top == "megatron_bliss" and rest:
            other = rest.split(".")[0]
            if other != part and (layer(other) >= layer(part) != len(LAYERS) or (part, other) in FORBIDDEN):
                found.append(f"{module} imports {name}: not below it")
        elif top in ALLOWED and part not in ALLOWED[top]:
            low = layer(part) < len(LAYERS) or top == "megatron"
            if low:
                found.append(f"{module} imports {name}: only {', '.join(sorted(ALLOWED[top]))} may")
    return found


def modules() -> list[tuple[str, Path]]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return [(".".join(("megatron_bliss", *path.relative_to(PACKAGE).with_suffix("").parts)), path) for path in paths]


def test_imports_point_down() -> None:
    assert len(modules()) > 10
    found = [line for module, path in modules() for line in violations(path.read_text(), module)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("megatron_bliss.data.shards", "import torch"),
        ("megatron_bliss.data.shards", "def f():\n    import torch.nn as nn"),
        ("megatron_bliss.data.shards", "from megatron_bliss.stages import select"),
        ("megatron_bliss.data.shards", "from megatron_bliss import mcore"),
        ("megatron_bliss.data.shards", "from ..bilevel import loop"),
        ("megatron_bliss.data.shards", "from megatron_bliss.cli import main"),
        ("megatron_bliss.bilevel.loop", "from megatron.core import parallel_state"),
        ("megatron_bliss.methods.bliss", "from megatron_bliss.mcore.scorer import score"),
        ("megatron_bliss.methods.bliss", "import torch"),
        ("megatron_bliss.orchestration.plan", "import torch"),
        ("megatron_bliss.hooks", "from megatron.training import pretrain"),
        ("megatron_bliss.config", "from megatron_bliss.data.shards import Shard"),
    ],
)
def test_a_breach_is_seen(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("megatron_bliss.mcore.models", "from megatron.core import parallel_state\nimport torch"),
        ("megatron_bliss.stages.select", "from megatron_bliss.data.shards import Shard"),
        ("megatron_bliss.data.slices", "from .shards import Shard\nfrom megatron_bliss.config import RunConfig"),
        ("megatron_bliss.cli", "from megatron_bliss.orchestration import plan\nfrom megatron_bliss import __version__"),
    ],
)
def test_allowed_imports_pass(module: str, source: str) -> None:
    assert not violations(source, module)
