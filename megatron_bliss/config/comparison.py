"""A comparison: one run a seed, with all arms beside each other. Its YAML has these keys:

run: my.yaml                  # the settings of every run, in place or in a file; its method is the main arm
seeds: [1, 2, 3]
corpus: demo                  # instead of `data` in `run`: text that this machine has
arms:                         # by name, what differs from the main arm; `method` and `steps_factor` as in controls
  random: {method: random, steps_factor: 2}
  no_kl: {bilevel.gamma: 0}
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_bliss.config.files import read_given, settings_of
from megatron_bliss.config.run import RunConfig
from megatron_bliss.errors import UserError

_KEYS = ("run", "seeds", "corpus", "arms")
_CORPORA = (None, "demo")


@dataclass(frozen=True)
class Comparison:
    """What a file and the command line say; `run_config` makes a run of it."""

    path: Path
    given: Any  # settings of the run, unchecked
    overrides: list[str]  # key=value, of the run
    seeds: list[int]
    corpus: str | None
    arms: dict[str, dict[str, Any]]

    def run_config(self, seed: int, data: Mapping[str, Any] | None = None) -> RunConfig:
        """The run of one seed.

        :param data: settings under `data` that a corpus made here brings.
        :raises UserError: as for any run.
        """
        given = OmegaConf.merge(self.given, {"data": dict(data)} if data else {})
        given.seed = seed
        controls = list(OmegaConf.select(given, "controls") or [])
        given.controls = [*controls, *(_control(name, arm) for name, arm in self.arms.items())]
        return settings_of(given, self.overrides, self.path)


def load_comparison(path: Path, overrides: list[str]) -> Comparison:
    """Read a comparison's YAML; `key=value` is a setting of its runs, or one of its own keys.

    :raises UserError: for a file that is not one, or a value that cannot work.
    """
    given = read_given(path)
    ours = [word for word in overrides if word.partition("=")[0].split(".")[0] in _KEYS]
    try:
        given = OmegaConf.merge(given, OmegaConf.from_dotlist(ours))
        unknown = [str(key) for key in given if key not in _KEYS]
        if unknown:
            raise UserError(f"{path}: {', '.join(unknown)} is no key of a comparison; it has {', '.join(_KEYS)}")
        content: dict[str, Any] = OmegaConf.to_container(given, resolve=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    seeds, arms, corpus = content.get("seeds", [1, 2, 3]), content.get("arms") or {}, content.get("corpus")
    if not isinstance(seeds, list) or not seeds or len(set(map(str, seeds))) < len(seeds) or not _whole(seeds):
        raise UserError(f"{path}: seeds is {seeds}; it must be a list of whole numbers, each once")
    if not isinstance(arms, dict) or not all(isinstance(arm, dict) for arm in arms.values()):
        raise UserError(f"{path}: arms must be settings by name, as no_kl: {{bilevel.gamma: 0}}")
    if corpus not in _CORPORA:
        raise UserError(f"{path}: corpus is {corpus!r}; it can be demo, or left out")
    is_moved = any(word.startswith("run=") for word in ours)  # then it is as seen from here, not from the file
    settings = _settings(content.get("run"), path, Path() if is_moved else path.parent)
    others = [word for word in overrides if word not in ours]
    return Comparison(path, settings, others, seeds, corpus, {str(name): arm for name, arm in arms.items()})


def _whole(numbers: list[Any]) -> bool:
    return all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers)


def _settings(run: Any, path: Path, folder: Path) -> DictConfig:
    if isinstance(run, str):
        run = OmegaConf.to_container(read_given(folder / run))
    if not isinstance(run, dict):
        raise UserError(f"{path}: run must be settings of a run, or the path of its YAML file")
    return OmegaConf.create(run)


def _control(name: str, arm: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in arm.items() if key not in ("method", "steps_factor")}
    return {"name": name, "settings": own} | {key: arm[key] for key in ("method", "steps_factor") if key in arm}
