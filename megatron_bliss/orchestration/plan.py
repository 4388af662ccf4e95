"""Which stages a run has, in which order, and what each needs: a pure function of the settings.

Only real data dependencies are drawn, so a launcher may run side by side whatever is not connected: the control arms,
the warm-up of the proxy and of the target, the evaluation of one round and the bilevel loop of the next. With
`launch.mode=overlap`, the bilevel loop of a round runs beside the training of the round before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.config import RunConfig, control_config, proxy_run, warmup_run
from megatron_bliss.mcore.checkpoint_files import iteration_path
from megatron_bliss.methods import offline_method
from megatron_bliss.methods.offline import OfflineMethod


@dataclass(frozen=True)
class Arm:
    """The main run, or one of its controls, as a run of its own."""

    name: str  # the method's for the main run, the control's own name otherwise
    prefix: str  # of its stages' names: "" or "controls/NAME/"
    config: RunConfig
    paths: RunPaths

    @property
    def method(self) -> OfflineMethod:
        return offline_method(self.config)

    @property
    def warmup(self) -> RunPaths:
        """The run that this arm's warm-up is taken from."""
        return warmup_run(self.config, self.paths)

    @property
    def proxy(self) -> tuple[str, Path]:
        """The stage that warms up this arm's proxy, and where the proxy then lies."""
        name = self.stage_name("warmup-proxy") if self.config.warmup.own_proxy else "warmup-proxy"
        return name, proxy_run(self.config, self.paths).warmup_proxy

    @property
    def measures_fidelity(self) -> bool:
        """Whether its score model and proxy are compared with the LLM."""
        return self.method.scored_by == "score_model" and self.config.fidelity.sequences > 0

    def target_checkpoint(self, round_number: int) -> Path:
        """The target at the end of a round; round 0 is the warm-up."""
        if round_number == 0:
            return self.warmup.warmup_target
        return iteration_path(self.paths.target, self.config.round_end(round_number))

    def stage_name(self, command: str, round_number: int | None = None) -> str:
        """Such as `score` of round 1: `round-0001/score`, or `controls/NAME/round-0001/score`."""
        folder = "" if round_number is None else f"{self.paths.round(round_number).name}/"
        return f"{self.prefix}{folder}{command}"


@dataclass(frozen=True)
class Stage:
    """One call of `megatron-bliss`, and what has to be there before and after it."""

    name: str
    run_dir: Path
    command: tuple[str, ...]  # words after `megatron-bliss`
    num_ranks: int
    needs: tuple[str, ...]  # names of stages
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    iterations: tuple[int, int] | None = None  # of the LLM at the start and the end, where Megatron counts them

    @property
    def round_number(self) -> int | None:
        """None for a stage before the first round; 0 for the warm-up's part of a stage that rounds have."""
        return int(self.command[self.command.index("--round") + 1]) if "--round" in self.command else None


def arms(config: RunConfig, run_dir: Path) -> list[Arm]:
    """The main run and its controls."""
    paths = RunPaths(run_dir.absolute())
    controls = [
        Arm(
            control.name,
            f"controls/{control.name}/",
            control_config(config, control, paths.root),
            paths.control(control.name),
        )
        for control in config.controls
    ]
    return [Arm(config.method, "", config, paths), *controls]


def plan(config: RunConfig, run_dir: Path) -> list[Stage]:
    """All stages, each after those it needs."""
    main, *controls = arms(config, run_dir)
    stages = [_inventory(main)]
    with_proxy = [arm for arm in (main, *controls) if arm.method.needs_proxy]
    if config.warmup.start_from is None:
        stages += _warmup(main)
        if any(not arm.config.warmup.own_proxy for arm in with_proxy):
            stages.append(_warmup_proxy(main))
    for arm in (main, *controls):
        if arm is not main and (arm.warmup != main.paths or arm.config.data != main.config.data):
            stages.append(_inventory(arm))
        if arm in with_proxy and arm.config.warmup.own_proxy:
            stages.append(_warmup_proxy(arm))
        for number in range(1, config.rounds + 1):
            stages += _round(arm, number, {stage.name for stage in stages})
    stages.append(_report(main, [stage for stage in stages if stage.command[0] in ("evaluate", "fidelity")]))
    known = {stage.name for stage in stages}  # what belongs to the run that a warm-up is taken from is not among them
    return [replace(stage, needs=tuple(name for name in stage.needs if name in known)) for stage in stages]


def _stage(
    arm: Arm,
    command: str,
    *,
    needs: list[str],
    inputs: list[Path],
    output: Path,
    round_number: int | None = None,
    distributed: bool = True,
    iterations: tuple[int, int] | None = None,
) -> Stage:
    words: tuple[str, ...] = (command, "--run", str(arm.paths.root))
    if round_number is not None:
        words += ("--round", str(round_number))
    num_ranks = arm.config.launch.num_ranks if distributed else 1
    name = arm.stage_name(command, round_number)
    return Stage(name, arm.paths.root, words, num_ranks, tuple(needs), tuple(inputs), (output,), iterations)


def _inventory(arm: Arm) -> Stage:
    data = arm.config.data
    prefixes = [prefix for domain in data.pool for prefix in domain.prefixes]
    measured = [*data.validation_prefixes.values(), *([data.test] if data.test else [])]
    files = [Path(f"{prefix}{suffix}") for prefix in (*prefixes, *measured) for suffix in (".idx", ".bin")]
    files += [Path(f"{prefix}.mask") for prefix in measured]  # a set may have one, now or later
    return _stage(arm, "inventory", needs=[], inputs=files, output=arm.paths.inventory, distributed=False)


def _warmup(arm: Arm) -> list[Stage]:
    selection = arm.paths.warmup_selection
    inventory = [arm.paths.inventory]
    after = ["warmup-select"]
    stages = [_stage(arm, "warmup-select", needs=["inventory"], inputs=inventory, output=selection, distributed=False)]
    if arm.config.warmup.target_steps:
        span = (0, arm.config.round_end(0))
        stages.append(_prepare(arm, 0, after[0], selection))
        stages.append(
            _stage(
                arm,
                "warmup-target",
                needs=[*after, stages[-1].name],
                inputs=[selection],
                output=arm.paths.warmup_target,
                iterations=span,
            )
        )
    return stages


def _warmup_proxy(arm: Arm) -> Stage:
    selection = arm.warmup.warmup_selection
    return _stage(arm, "warmup-proxy", needs=["warmup-select"], inputs=[selection], output=arm.paths.warmup_proxy)


def _prepare(arm: Arm, number: int, select: str, selection: Path) -> Stage:
    """:param number: of the round; 0 for the warm-up.
    :param select: name of the stage that makes the selection.
    """
    indices = arm.paths.indices(number)
    stage = _stage(
        arm, "prepare", needs=[select], inputs=[selection], output=indices, round_number=number, distributed=False
    )
    return stage if number else replace(stage, name=arm.stage_name("warmup-prepare"))


def _round(arm: Arm, number: int, earlier: set[str]) -> list[Stage]:
    """The stages of a round, after those `earlier`."""
    paths, method, has_guards = arm.paths, arm.method, arm.config.guards.action != "none"
    inventory = arm.stage_name("inventory")
    inventory_file = paths.inventory
    if inventory not in earlier:
        inventory, inventory_file = "inventory", arm.warmup.inventory
    warmup_proxy, proxy = arm.proxy
    target = [arm.target_checkpoint(number - 1)] if arm.config.round_end(number - 1) else []
    after_target = [arm.stage_name("pretrain", number - 1) if number > 1 else "warmup-target"]
    after_model, model = [warmup_proxy], proxy
    stages = []
    if method.learns == "ngrams":
        model, after_model = paths.ngrams(number), [arm.stage_name("ngrams", number)]
        stages.append(
            _stage(
                arm,
                "ngrams",
                needs=[inventory],
                inputs=[inventory_file],
                output=model / "manifest.json",
                round_number=number,
                distributed=False,
            )
        )
    if method.learns == "influence":
        influence, model = paths.influence(number), paths.influence_model(number)
        needs, inputs = [inventory, warmup_proxy], [inventory_file, proxy]
        stages.append(_stage(arm, "influence", needs=needs, inputs=inputs, output=influence, round_number=number))
        after_model = [arm.stage_name("fit-influence", number)]
        needs, inputs = [*needs, stages[-1].name], [*inputs, influence]
        stages.append(_stage(arm, "fit-influence", needs=needs, inputs=inputs, output=model, round_number=number))
    if method.learns == "bilevel":
        after_learned, learned = after_target, target
        if arm.config.launch.mode == "overlap" and number > 1:
            # as soon as the round before can train; which checkpoint it takes is then noted by the stage, not here
            before_that = arm.stage_name("pretrain", number - 2) if number > 2 else "warmup-target"
            after_learned, learned = [before_that, arm.stage_name("prepare", number - 1)], []
        needs, inputs = [inventory, warmup_proxy, *after_learned], [inventory_file, proxy, *learned]
        if arm.config.bilevel.uses_cached_target:
            cache = paths.target_cache(number)
            before, files = [inventory, *after_learned], [inventory_file, *learned]
            stages.append(_stage(arm, "cache-target", needs=before, inputs=files, output=cache, round_number=number))
            needs.append(stages[-1].name)
            inputs.append(cache)
        if number > 1:  # the score model carries over
            needs.append(arm.stage_name("bilevel", number - 1))
            inputs.append(paths.bilevel(number - 1))
            inputs.append(paths.guard(number - 1))  # where it is there, an earlier one
            if has_guards:
                needs.append(arm.stage_name("score", number - 1))
        after_model, model = [arm.stage_name("bilevel", number)], paths.bilevel(number)
        stages.append(_stage(arm, "bilevel", needs=needs, inputs=inputs, output=model, round_number=number))
    select_needs, select_inputs = [inventory], [inventory_file]
    if method.scored_by != "none":
        needs, inputs, scores = [inventory, *after_model], [inventory_file, model], paths.scores(number)
        if has_guards and number > 1:  # they compare the LLM's losses before anything else is selected
            needs.append(arm.stage_name("evaluate", number - 1))
        stages.append(_stage(arm, "score", needs=needs, inputs=inputs, output=scores, round_number=number))
        select_needs.append(arm.stage_name("score", number))
        select_inputs += [scores, paths.guard(number)]
        if arm.measures_fidelity and target:
            needs = [*needs, warmup_proxy, *after_target, stages[-1].name]
            inputs = [inventory_file, proxy, model, scores, *target]
            output = paths.fidelity(number) / "results.json"
            stages.append(_stage(arm, "fidelity", needs=needs, inputs=inputs, output=output, round_number=number))
    if arm.config.selection.pool == "all" and not method.takes_all:  # what those before have taken is left out
        select_needs.append(arm.stage_name("select", number - 1) if number > 1 else "warmup-select")
        select_inputs += [arm.warmup.warmup_selection, *map(paths.selection, range(1, number))]
    selection, trained = paths.selection(number), arm.target_checkpoint(number)
    stages += [
        _stage(
            arm,
            "select",
            needs=select_needs,
            inputs=select_inputs,
            output=selection,
            round_number=number,
            distributed=False,
        ),
        _prepare(arm, number, arm.stage_name("select", number), selection),
        _stage(
            arm,
            "pretrain",
            needs=[arm.stage_name("select", number), arm.stage_name("prepare", number), *after_target],
            inputs=[selection, *target],
            output=trained,
            round_number=number,
            iterations=(arm.config.round_end(number - 1), arm.config.round_end(number)),
        ),
        _stage(
            arm,
            "evaluate",
            needs=[inventory, arm.stage_name("pretrain", number)],
            inputs=[inventory_file, trained],
            output=paths.evaluation(number) / "results.json",
            round_number=number,
        ),
    ]
    return stages


def _report(arm: Arm, measured: list[Stage]) -> Stage:
    root = arm.paths.root
    return Stage(
        name="report",
        run_dir=root,
        command=("report", str(root)),
        num_ranks=1,
        needs=tuple(stage.name for stage in measured),
        inputs=tuple(path for stage in measured for path in stage.outputs),
        outputs=(arm.paths.report, root / "result.json"),
    )


def by_urgency(stages: Sequence[Stage]) -> list[Stage]:
    """The stages in the order to start them in as far as they can be: those with the longest chain behind them first,
    so that no chain is left over at the end while other processors stand idle."""
    chains = {stage.name: 0 for stage in stages}
    for stage in reversed(stages):  # a plan names a stage after what it needs
        for name in stage.needs:
            chains[name] = max(chains[name], chains[stage.name] + 1)
    return sorted(stages, key=lambda stage: -chains[stage.name])
