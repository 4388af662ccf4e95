"""Everything that is checked, and how it is shown."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.config import RunConfig, load_config, read_saved_config
from megatron_bliss.doctor import data, machine, storage
from megatron_bliss.doctor.findings import Finding, broken, can_run
from megatron_bliss.errors import UserError
from megatron_bliss.orchestration import cost
from megatron_bliss.orchestration.check import check
from megatron_bliss.orchestration.plan import arms
from megatron_bliss.wording import counted

_STYLES = {"ok": "green", "gap": "yellow", "broken": "bold red"}
_WIDTH = 160  # of the table where there is no terminal


def show(config_path: Path | None, overrides: list[str], run_dir: Path | None, in_full: bool, as_json: bool) -> bool:
    """Print what was found.

    :param run_dir: also where settings come from if there are no others.
    :returns: whether the settings can run here.
    :raises UserError: for settings that cannot be read.
    """
    if config_path is None and overrides:
        raise UserError(f"{overrides[0]} changes settings, and there are none: give CONFIG before it")
    config = load_config(config_path, overrides) if config_path else None
    if config is None and run_dir is not None and RunPaths(run_dir).config.exists():
        config = read_saved_config(RunPaths(run_dir).config)
    directory = run_dir or (Path("runs") / config_path.stem if config_path else Path("runs"))
    findings = examine(config, directory, in_full)
    if as_json:
        content = {"schema": 1, "can_run": can_run(findings), "run": str(directory), "sampled": not in_full}
        print(json.dumps(content | {"findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        _print(findings, config is not None, directory, in_full)
    return can_run(findings)


def examine(config: RunConfig | None, run_dir: Path, in_full: bool = False) -> list[Finding]:
    """All checks, those of settings and data only where there are settings."""
    findings = [*machine.check_machine(machine.look(), config), *storage.check_run_directory(run_dir)]
    if config is None:
        return [*findings, storage.check_space(run_dir, None), storage.check_scratch()]
    costs = "`megatron-bliss run` refuses to start"
    try:
        check(config, run_dir)
        findings.append(Finding("settings", "ok", f"{config.method}, {counted(config.rounds, 'round')}"))
        findings.append(_space(config, run_dir))
    except UserError as error:
        findings.append(broken("settings", error, costs, "change the setting"))
    findings.append(storage.check_scratch())
    return [*findings, *data.check_data(config, _measured_sets(config, run_dir), in_full)]


def _space(config: RunConfig, run_dir: Path) -> Finding:
    pool, _ = cost.measure(config)
    costs = [each for arm in arms(config, run_dir) for each in cost.arm_costs(arm, pool).values()]
    return storage.check_space(run_dir, sum(each.disk or 0 for each in costs), is_lower_bound=pool is None)


def _measured_sets(config: RunConfig, run_dir: Path) -> list[tuple[str, str]]:
    """Name and prefix of each validation and test set, each prefix once."""
    found: dict[str, str] = {}
    for arm in arms(config, run_dir):
        for name, prefix in arm.config.data.validation_prefixes.items():
            what = "validation" if name == "validation" else f"validation set {name}"
            found.setdefault(prefix, what if not arm.prefix else f"{what} of {arm.name}")
    if config.data.test is not None:
        found.setdefault(config.data.test, "test")
    return [(name, prefix) for prefix, name in found.items()]


def _print(findings: list[Finding], has_config: bool, run_dir: Path, in_full: bool) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    for column in ("found", "what it costs", "what closes it"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        status = Text(finding.status, style=_STYLES[finding.status])
        table.add_row(finding.name, status, *map(Text, (finding.value, finding.costs, finding.remedy)))
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    console.print(table)
    gaps, failures = (sum(finding.status == status for finding in findings) for status in ("gap", "broken"))
    verdict = "can run here" if can_run(findings) else "cannot run here"
    what = f"{run_dir} {verdict}" if has_config else "this machine"
    console.print(f"{what}: {failures} broken, {gaps} gaps", soft_wrap=True, highlight=False)
    if has_config and not in_full:
        sampled = f"token ids of at most {data.SAMPLED_SEQUENCES} sequences and parts of indices were looked at"
        console.print(f"{sampled}; --full looks at all", soft_wrap=True, highlight=False)
