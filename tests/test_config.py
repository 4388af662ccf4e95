"""Settings: defaults, presets, overrides and the sentences a user sees when one is wrong."""

from pathlib import Path

import pytest

from megatron_bliss import config as settings
from megatron_bliss.config import control_config as config_of_control
from megatron_bliss.errors import UserError

NEEDED = [
    "data.validation=valid",
    "data.tokenizer.vocab_size=2048",
    "data.pool=[{name: web, prefixes: [web]}, {name: code, prefixes: [code]}]",
]


def load(*overrides: str) -> settings.RunConfig:
    return settings.load_config(None, [*NEEDED, *overrides])


def test_defaults_are_the_papers_recipe() -> None:
    config = load()
    assert (config.target.model.preset, config.proxy.model.preset) == ("pythia-410m", "pythia-31m")
    assert (config.round_steps, config.selection.fraction, config.bilevel.outer_steps) == (10_000, 0.2, 3000)
    assert config.num_slices == config.rounds + 1


def test_file_then_override_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("rounds: 7\nbilevel: {gamma: 0.5}\n")
    config = settings.load_config(path, [*NEEDED, "bilevel.gamma=0"])
    assert (config.rounds, config.bilevel.gamma) == (7, 0)


def test_paper_preset_sets_the_authors_solver_and_user_settings_win() -> None:
    config = load("bilevel.preset=paper", "bilevel.z_steps=5").bilevel
    assert (config.solver, config.damping, config.z_lr, config.z_steps) == ("paper", 1e-2, 1e-2, 5)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("bilevel.gama=1", "gama"),
        ("rounds=many", "rounds"),
        ("rounds=0", "rounds is 0; it must be above 0"),
        ("selection.fraction=1.5", "selection.fraction is 1.5"),
        ("online.method=best", "online.method is 'best'; it must be one of none, blade, rho1, self"),
        ("online.keep=0", "online.keep is 0.0; it must be above 0 and at most 1"),
        ("online.reference=ckpt", "online.reference is ckpt and online.method is none"),
        ("method=best", "method is 'best'; it must be one of"),
        ("bilevel.solver=newton", "bilevel.solver is 'newton'"),
        ("data.pool=[]", "data.pool is empty"),
        ("data.pool=[{name: a, prefixes: []}]", "has no prefixes"),
        ("data.pool=[{name: a, prefixes: [x]}, {name: a, prefixes: [y]}]", "twice"),
        ("data.pool=[{name: a, prefixes: [x], weight: 1}, {name: b, prefixes: [y]}]", "some domains only"),
        ("controls=[{name: r, method: random, steps_factor: 9}]", "more than all of it"),
        ("controls=[{name: r, steps_factor: 0}]", "steps_factor 0.0; it must be above 0"),
        ("controls=[{name: r, settings: {perplexity: {keep: best}}}]", "'r': perplexity.keep is 'best'"),
        ("controls=[{name: r, steps_factor: 0.00001}]", "'r': round_steps is 0"),
        ("controls=[{name: r}, {name: r}]", "used once"),
        ("controls=[{name: r}]", "'r': it is the main arm over again"),
        ("controls=[{name: r, method: best}]", "'r': method is 'best'"),
        ("controls=[{name: r, settings: {bilevel.gama: 0}}]", "'r': bilevel.gama: Key 'gama' not in 'BilevelConfig'"),
        ("controls=[{name: r, settings: {bilevel.gamma: much}}]", "'r': bilevel.gamma: Value 'much'"),
        ("controls=[{name: r, settings: {target.lr: 1}}]", "'r': target.lr is the same in all arms"),
        ("controls=[{name: r, settings: {seed: 3}}]", "'r': seed is the same in all arms"),
        ("controls=[{name: r, settings: {data: {test: x}}}]", "'r': data.test is the same in all arms"),
        ("controls=[{name: r, settings: {warmup.target_steps: 1}}]", "'r': warmup.target_steps is the same"),
        ("warmup.target_steps=-1", "warmup.target_steps is -1; it must not be below 0"),
        ("evaluation.decay_steps=-1", "evaluation.decay_steps is -1"),
        ("data.held_out=-1", "data.held_out is -1"),
        ("data.tokenizer.vocab_size=0", "data.tokenizer.vocab_size is 0"),
        ("proxy.model.num_layers=-2", "proxy.model.num_layers is -2"),
        ("bilevel.gradient_average=1", "bilevel.gradient_average is 1.0; it must be at least 0 and below 1"),
        ("data.pool=[{name: a/b, prefixes: [x]}]", "'a/b'"),
        ("data.pool=[{name: '', prefixes: [x]}]", "is not empty"),
        ("bilevel.preset=[1]", "bilevel.preset"),
        ("bilevel=3", "BilevelConfig"),
        ("method=[", "method="),
        ("method=${nowhere}", "nowhere"),
        ("=1", "key=value"),
        ("rounds", "key=value"),
    ],
)
def test_a_wrong_setting_is_named(override: str, words: str) -> None:
    with pytest.raises(UserError, match=r".*".join(words.split("…"))):
        load(override)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"rounds: [1\nmethod: }", "cannot be read as YAML settings"),
        (b"- rounds\n- 3\n", "holds a list"),
        (b"3", "cannot be read as YAML settings"),
        (b"method: \xff\xfe\n", "cannot be read as YAML settings"),
        (None, "cannot be read as YAML settings"),  # a directory
    ],
)
def test_a_file_that_is_no_settings_is_refused_in_one_sentence(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "run.yaml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    for read in (settings.read_saved_config, lambda path: settings.load_config(path, NEEDED)):
        with pytest.raises(UserError, match=words) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_values_are_listed() -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer\.vocab_size.*data\.validation|without a value"):
        settings.load_config(None, [])


def test_saved_settings_come_back_and_changes_are_listed(tmp_path: Path) -> None:
    config = load("controls=[{name: r, steps_factor: 3}]")
    settings.save_config(config, tmp_path / "run.yaml")
    saved = settings.read_saved_config(tmp_path / "run.yaml")
    assert settings.differences(saved, config) == []
    changed = settings.differences(saved, load("controls=[{name: r, steps_factor: 2}]", "bilevel.gamma=0"))
    assert changed == ["bilevel.gamma: 0.01 -> 0.0", "controls.0.steps_factor: 3.0 -> 2.0"]


def control(*settings: str, given: tuple[str, ...] = ()) -> settings.RunConfig:
    config = load(*given, f"controls=[{{name: arm, settings: {{{', '.join(settings)}}}}}]")
    return config_of_control(config, config.controls[0], Path("main"))


def test_a_control_arm_differs_in_its_settings_alone() -> None:
    main, arm = load(), control("bilevel.gamma: 0", "selection: {fraction: 0.1}", "data.validation: other")
    assert settings.differences(main, arm) == [
        "bilevel.gamma: 0.01 -> 0.0", "data.validation: valid -> other", "selection.fraction: 0.2 -> 0.1",
        "warmup.start_from: None -> main",
    ]  # fmt: skip


def test_an_arms_preset_and_size_bring_what_they_bring_to_a_run() -> None:
    given = ("bilevel.damping=0.5", "bilevel.outer_steps=7")
    arm = control("bilevel.preset: paper", "bilevel.z_steps: 5", "selection.tokens: 1000", given=given)
    assert (arm.bilevel.solver, arm.bilevel.damping, arm.bilevel.z_steps) == ("paper", 1e-2, 5)
    assert (arm.selection.tokens, arm.selection.fraction, arm.bilevel.outer_steps) == (1000, None, 7)


@pytest.mark.parametrize(
    ("setting", "has_own_proxy"),
    [
        ("proxy.model.preset: pythia-70m", True),
        ("warmup.proxy_steps: 5", True),
        ("bilevel.weight_decay: 0", True),
        ("bilevel.gamma: 0", False),
        ("proxy.recompute: true", False),
    ],
)
def test_an_arm_warms_up_its_own_proxy_where_that_is_another_one(setting: str, has_own_proxy: bool) -> None:
    assert control(setting).warmup.own_proxy is has_own_proxy


def test_a_control_arm_takes_more_steps_on_as_much_more_data() -> None:
    config = load("controls=[{name: r, method: random, steps_factor: 3}]")
    arm = settings.control_config(config, config.controls[0], Path("main"))
    assert arm.round_steps == 3 * config.round_steps
    assert arm.selection.fraction == pytest.approx(3 * config.selection.fraction)
    assert (arm.method, arm.warmup.start_from, arm.controls) == ("random", "main", [])


@pytest.mark.parametrize("layout", ["pipeline_parallel", "context_parallel"])
def test_layouts_that_online_selection_does_not_have_are_refused(layout: str) -> None:
    assert getattr(load(f"target.{layout}=2").target, layout) == 2
    with pytest.raises(UserError, match=rf"target.{layout} is 2: online.method=blade .* set it to 1"):
        load(f"target.{layout}=2", "online.method=blade")
