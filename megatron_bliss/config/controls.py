"""Control arms: what they may have of their own, and their settings as runs of their own."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_bliss.config.methods import BILEVEL_PRESETS
from megatron_bliss.config.run import ControlConfig, RunConfig
from megatron_bliss.errors import UserError

# What makes arms comparable: pool, target, schedule, seed, measure. All else decides on the data or on the loss.
_OF_THE_RUN = ("launch", "tracking", "controls")
IN_COMMON = ("seed", "rounds", "round_steps", "data", "target", "warmup", "evaluation", *_OF_THE_RUN)
_EXCEPT = (
    *("data.validation", "data.validation_sets", "data.validation_weighting", "data.validation_rate"),
    *("warmup.proxy_steps", "warmup.proxy_batch_size", "warmup.proxy_lr"),
)


def merged(base: Any, given: Any) -> DictConfig:
    """Given settings over others, with what they bring along: the numbers of a preset; that a size of the selection
    (`tokens`, `threshold`) takes the place of `fraction`, one validation set that of several, and several that of one.

    :param base: a `RunConfig`, or the class for its defaults.
    :raises OmegaConfBaseException: for what is no setting, or a value of another type.
    """
    preset = str(OmegaConf.select(given, "bilevel.preset") or "default")
    along = OmegaConf.create({"bilevel": BILEVEL_PRESETS.get(preset, {})})
    if any(OmegaConf.select(given, f"selection.{size}") is not None for size in ("tokens", "threshold")):
        along.selection = {"fraction": None}
    settings = OmegaConf.structured(base)
    if OmegaConf.select(given, "data.validation") is not None:
        settings.data.validation_sets = {}
    if OmegaConf.select(given, "data.validation_sets"):
        settings.data.validation = None
    found: DictConfig = OmegaConf.merge(settings, along, given)  # type: ignore[assignment]
    return found


def control_config(config: RunConfig, control: ControlConfig, main_run: Path) -> RunConfig:
    """The settings of a control arm as a run of its own, with as much more data as it takes more steps.

    It starts from the main arm's warm-up; where its proxy is another one, it warms that up itself.

    :raises UserError: for what is no setting, cannot be an arm's own, or is of another type.
    """
    own = _own_settings(control)
    arm = _with_settings(config, own) if own else config
    selection, factor = arm.selection, control.steps_factor
    if arm.method != "all" and (selection.fraction or 0) * factor > 1:
        raise UserError(
            f"it needs {factor} times {selection.fraction} of a slice, which is more than all of it; lower "
            "steps_factor or selection.fraction"
        )
    has_own_proxy = config.warmup.own_proxy or _proxy_settings(arm) != _proxy_settings(config)
    return replace(
        arm,
        round_steps=round(config.round_steps * factor),
        selection=replace(
            selection,
            fraction=selection.fraction and min(selection.fraction * factor, 1.0),  # above 1 for method `all` alone
            tokens=selection.tokens and round(selection.tokens * factor),
        ),
        warmup=replace(
            arm.warmup, start_from=config.warmup.start_from or str(main_run), own_proxy=has_own_proxy
        ),
        controls=[],
    )  # fmt: skip


def _own_settings(control: ControlConfig) -> dict[str, Any]:
    """What an arm has of its own, by dotted key.

    :raises UserError: for a setting that all arms have in common, or if it has none.
    """
    own = _flat(control.settings) | ({} if control.method is None else {"method": control.method})
    for key in own:
        if _is_among(key, IN_COMMON) and not _is_among(key, _EXCEPT):
            raise UserError(
                f"{key} is the same in all arms, so that they can be compared; what an arm may have of its own is what "
                f"decides on its data or its loss, and of these groups {', '.join(_EXCEPT)}"
            )
    if not own and control.steps_factor == 1:
        raise UserError("it is the main arm over again; give it a method, settings or a steps_factor")
    return own


def _is_among(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _flat(settings: Mapping[Any, Any], above: str = "") -> dict[str, Any]:
    """Nested or dotted settings as dotted ones."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return found


def _with_settings(config: RunConfig, own: Mapping[str, Any]) -> RunConfig:
    given = OmegaConf.create()
    try:
        for key, value in own.items():
            OmegaConf.update(given, key, value, force_add=True)
        found: RunConfig = OmegaConf.to_object(merged(config, given))  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    return found


def _proxy_settings(config: RunConfig) -> list[Any]:
    """All that the warmed-up proxy depends on; `warmup-proxy` takes Adam's settings from those of the loop."""
    warmup, bilevel = config.warmup, config.bilevel
    return [
        config.proxy.model,
        *(warmup.proxy_steps, warmup.proxy_batch_size, warmup.proxy_lr),
        *(bilevel.weight_decay, bilevel.beta1, bilevel.beta2, bilevel.clip_grad),
    ]
