"""Settings from YAML with `key=value` overrides, checked before anything starts; and back into a run's directory."""

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # omegaconf reads with it
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_bliss.artifacts import atomic_write
from megatron_bliss.config.controls import control_config, merged
from megatron_bliss.config.online import OnlineConfig
from megatron_bliss.config.run import RunConfig
from megatron_bliss.errors import UserError
from megatron_bliss.settings_check import check, check_given, check_online


def load_config(path: Path | None, overrides: list[str]) -> RunConfig:
    """Read YAML (or start from the defaults), apply the preset, then `key=value` overrides, and check everything.

    :raises UserError: for a file that is not YAML settings, an unknown key, a value of the wrong type, or one that
        cannot work.
    """
    return settings_of(read_given(path) if path else OmegaConf.create(), overrides, path)


def settings_of(given: Any, overrides: list[str], path: Path | None) -> RunConfig:
    """The same from what a file says.

    :param path: of the file, for errors.
    """
    for word in overrides:
        if not word.partition("=")[0] or "=" not in word:
            raise UserError(f"{word!r} is not a setting: write key=value, for example bilevel.gamma=0")
    try:
        given = OmegaConf.merge(given, OmegaConf.from_dotlist(overrides))
        check_given(given)
        return _checked(merged(RunConfig, given))
    except OmegaConfBaseException as error:
        where = ": ".join(str(part) for part in (path, error.full_key) if part)
        raise UserError(f"{where}: {str(error).splitlines()[0]}" if where else str(error).splitlines()[0]) from None
    except yaml.YAMLError as error:
        raise UserError(f"{' '.join(overrides)}: {_line(error)}; write each setting as key=value") from None


def load_online_config(method: str, overrides: list[str]) -> OnlineConfig:
    """Settings of online selection on their own, for a script that belongs to no run.

    :param overrides: `key=value`, keys without `online.`.
    :raises UserError: for an unknown key, a value of the wrong type, or one that cannot work.
    """
    try:
        given = OmegaConf.from_dotlist([f"method={method}", *overrides])
        settings: Any = OmegaConf.merge(OmegaConf.structured(OnlineConfig), given)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"--set {' '.join(overrides)}: {_line(error)}") from None
    check_online(settings)
    config: OnlineConfig = OmegaConf.to_object(settings)  # type: ignore[assignment]
    return config


def read_given(path: Path) -> Any:
    """What a YAML file says, nothing of it checked.

    :raises UserError: if it cannot be read, or is not a mapping.
    """
    try:
        given = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path of YAML settings") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML settings: {_line(error)}") from None
    if not isinstance(given, DictConfig):
        raise UserError(f"{path} holds a list; settings are written as key: value")
    return given


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _checked(settings: Any) -> RunConfig:
    check(settings)
    config: RunConfig = OmegaConf.to_object(settings)  # type: ignore[assignment]
    for control in config.controls:
        try:
            check(OmegaConf.structured(control_config(config, control, Path())))
        except UserError as error:
            raise UserError(f"controls: {control.name!r}: {error}") from None
    return config


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved settings; done once a run."""
    with atomic_write(path, "w") as stream:
        stream.write(OmegaConf.to_yaml(OmegaConf.structured(config)))


def read_saved_config(path: Path) -> RunConfig:
    """The settings a run was started with.

    :raises UserError: if the file is missing or damaged.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a directory that `megatron-bliss run` has made")
    try:
        return _checked(OmegaConf.merge(OmegaConf.structured(RunConfig), read_given(path)))
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}; restore the file, or start a new run") from None


def differences(saved: RunConfig, now: RunConfig) -> list[str]:
    """Lines `key: saved value -> value now` for every setting that changed."""
    old, new = _flat(OmegaConf.structured(saved)), _flat(OmegaConf.structured(now))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted(old | new) if old.get(key) != new.get(key)]


def _flat(config: DictConfig) -> dict[str, Any]:
    def walk(value: Any, key: str) -> dict[str, Any]:
        items: Any
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list):
            items = enumerate(value)
        else:
            return {key: value}
        found: dict[str, Any] = {}
        for name, part in items:
            found |= walk(part, f"{key}.{name}" if key else str(name))
        return found

    return walk(OmegaConf.to_container(config), "")
