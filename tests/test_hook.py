"""What a training script reads when a selection lies between it and Megatron's datasets."""

import json
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets import blended_megatron_dataset_builder as megatron_builder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_bliss.data.selection import Selection
from megatron_bliss.data.shards import Shard
from megatron_bliss.errors import UserError
from megatron_bliss.hooks import main
from megatron_bliss.mcore import dataset as hook
from megatron_bliss.mcore.script import PACKAGED_SCRIPT
from tests.selections import select, write_numbered_shard

LENGTH = 16  # tokens a sample
FORMS = ("single", "weighted", "unweighted", "args-file", "per-split", "per-split-file")


class Tokenizer:
    """As much of a tokenizer as Megatron's datasets ask for."""

    vocab_size, eod, pad, unique_identifiers = 1 << 30, 0, -1, {"class": "numbers"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three shards; no token is in two places."""
    folder = tmp_path_factory.mktemp("shards")
    return [write_numbered_shard(folder / name, 200, 10_000 * (i + 1), i) for i, name in enumerate("abv")]


@pytest.fixture(autouse=True)
def _megatrons_builder() -> Iterator[None]:
    original = megatron_builder.BlendedMegatronDatasetBuilder
    yield
    megatron_builder.BlendedMegatronDatasetBuilder = original


def data_arguments(form: str, pool: list[str], validation: str, folder: Path) -> Namespace:
    """The script's arguments about data, in each form that Megatron takes them."""
    names = ("data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path")
    flags: dict[str, Any] = dict.fromkeys((*names, "per_split_data_args_path", "split"))
    weighted = [word for weight, prefix in zip(("3", "1"), pool, strict=False) for word in (weight, prefix)]
    if form == "single":
        flags |= {"data_path": pool[:1], "split": "90,10,0"}
    elif form == "weighted":
        flags |= {"data_path": weighted, "split": "90,10,0"}
    elif form == "unweighted":
        flags |= {"data_path": pool, "split": "100,0,0"}
    elif form == "args-file":
        (folder / "blend.txt").write_text("\n".join(weighted))
        flags |= {"data_args_path": str(folder / "blend.txt"), "split": "90,10,0"}
    elif form == "per-split":
        flags |= {"train_data_path": weighted, "valid_data_path": [validation]}
    else:
        blends = {"train": " ".join(weighted), "valid": [validation], "test": [validation]}
        (folder / "blends.json").write_text(json.dumps(blends))
        flags |= {"per_split_data_args_path": str(folder / "blends.json")}
    return Namespace(**flags)


def config_of(arguments: Namespace, folder: Path, **settings: Any) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(arguments)
    return GPTDatasetConfig(
        random_seed=5,
        sequence_length=LENGTH,
        blend=blend,
        blend_per_split=blend_per_split,
        split=arguments.split,
        path_to_cache=str(folder / "cache"),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **settings,
    )


def build(config: GPTDatasetConfig, selection: Selection | None, num_samples: int = 60, kind: type = GPTDataset) -> Any:
    """Training, validation and test dataset, as a script builds them."""
    if selection is not None:
        hook.install(selection)
    builder = megatron_builder.BlendedMegatronDatasetBuilder  # what a script imports now
    return builder(kind, [num_samples, 5, 5], lambda: True, config).build()


def samples(dataset: Any) -> np.ndarray:
    """[samples, tokens]; empty without a dataset."""
    rows = [] if dataset is None else [dataset[i]["tokens"].numpy() for i in range(len(dataset))]
    return np.array(rows, dtype=np.int64).reshape(-1, LENGTH)


def tokens_of(prefix: str, ids: np.ndarray) -> set[int]:
    shard = Shard(prefix)
    return {int(token) for i in ids for token in shard[int(i)]}


def every_third(shards: list[str]) -> dict[str, np.ndarray]:
    return {prefix: np.arange(i, 200, 3) for i, prefix in enumerate(shards[:2])}


@pytest.mark.parametrize("form", FORMS)
def test_only_selected_tokens_are_served_and_none_twice(form: str, shards: list[str], tmp_path: Path) -> None:
    kept = every_third(shards)
    config = config_of(data_arguments(form, shards[:2], shards[2], tmp_path), tmp_path)
    train, *others = build(config, select(tmp_path / "selection", kept))
    served = samples(train)
    allowed = set().union(*(tokens_of(prefix, ids) for prefix, ids in kept.items()))
    assert len(served) >= 60
    assert set(served.flat) <= allowed
    assert len(set(served.flat)) == served.size  # fewer than an epoch of either shard: nothing twice
    hook_free = build(config_of(data_arguments(form, shards[:2], shards[2], tmp_path), tmp_path / "plain"), None)
    for ours, megatrons in zip(others, hook_free[1:], strict=True):
        assert np.array_equal(samples(ours), samples(megatrons))


def test_an_epoch_is_the_selection_but_for_the_tail(shards: list[str], tmp_path: Path) -> None:
    """Single shard: each selected token of the training split once; what is missing fills no sample."""
    ids = np.arange(1, 200, 3)
    config = config_of(data_arguments("single", shards, shards[2], tmp_path), tmp_path)
    train, _, _ = build(config, select(tmp_path / "selection", {shards[0]: ids}), num_samples=10)
    served = samples(train)
    allowed = tokens_of(shards[0], ids[ids < 180])  # 90 % of 200 sequences
    assert set(served.flat) <= allowed
    assert len(set(served.flat)) == served.size
    assert 0 < len(allowed) - served.size <= LENGTH


@pytest.mark.parametrize("form", FORMS)
def test_keeping_everything_changes_nothing(form: str, shards: list[str], tmp_path: Path) -> None:
    arguments = data_arguments(form, shards[:2], shards[2], tmp_path)
    plain = build(config_of(arguments, tmp_path / "plain"), None)
    everything = {prefix: np.arange(200) for prefix in shards[:2]}
    hooked = build(config_of(arguments, tmp_path / "hooked"), select(tmp_path / "selection", everything))
    for ours, megatrons in zip(hooked, plain, strict=True):
        assert np.array_equal(samples(ours), samples(megatrons))


def test_two_selections_do_not_share_a_cached_index(shards: list[str], tmp_path: Path) -> None:
    served = []
    for first in (0, 1):
        config = config_of(data_arguments("single", shards, shards[2], tmp_path), tmp_path)
        selection = select(tmp_path / f"selection{first}", {shards[0]: np.arange(first, 200, 2)})
        train, _, _ = build(config, selection, num_samples=20)
        served.append((train.unique_description_hash, set(samples(train).flat)))
    assert served[0][0] != served[1][0]
    assert not served[0][1] & served[1][1]


@pytest.mark.parametrize(
    ("form", "rest"),
    [(form, []) for form in FORMS if form != "single"]
    # the last sequence: outside the training split of the first two, too short for a sample in the third
    + [(form, [199]) for form in ("weighted", "args-file", "unweighted")],
)
def test_an_empty_domain_leaves_the_training_blend_only(
    form: str, rest: list[int], shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {shards[0]: np.array(rest, dtype=int), shards[1]: np.arange(0, 200, 2)}
    config = config_of(data_arguments(form, shards[:2], shards[2], tmp_path), tmp_path)
    if form == "unweighted":
        config.sequence_length = 64  # more tokens than any sequence has
    train, valid, _ = build(config, select(tmp_path / "selection", kept), num_samples=20)
    served = {int(token) for i in range(len(train)) for token in train[i]["tokens"]}
    assert served <= tokens_of(shards[1], kept[shards[1]])
    assert f"> {shards[0]}: nothing selected; dropped from the training blend" in capsys.readouterr().out
    if form in ("weighted", "args-file"):  # the validation split still has both
        assert {int(row[0]) // 10_000 for row in samples(valid)} == {1, 2}


def test_a_selection_without_training_data_is_refused(shards: list[str], tmp_path: Path) -> None:
    config = config_of(data_arguments("weighted", shards[:2], shards[2], tmp_path), tmp_path)
    outside = {prefix: np.array([199]) for prefix in shards[:2]}  # the training split ends at 180
    with pytest.raises(UserError, match="keeps nothing of the training data"):
        build(config, select(tmp_path / "selection", outside))


def test_an_unknown_shard_is_refused(shards: list[str], tmp_path: Path) -> None:
    config = config_of(data_arguments("weighted", shards[:2], shards[2], tmp_path), tmp_path)
    with pytest.raises(UserError, match=r"is not in selection"):
        build(config, select(tmp_path / "selection", {shards[0]: np.arange(10)}))


@pytest.mark.parametrize("field", ["fast_cache_load", "defer_npy_index_mmap"])
def test_settings_that_bypass_the_ids_are_refused(field: str, shards: list[str], tmp_path: Path) -> None:
    config = config_of(data_arguments("per-split", shards[:2], shards[2], tmp_path), tmp_path, **{field: True})
    selection = select(tmp_path / "selection", every_third(shards))
    with pytest.raises(UserError, match="cannot be used with a selection"):
        build(config, selection)
    config.selection = selection
    with pytest.raises(UserError, match="cannot be used with a selection"):
        hook.SelectedGPTDataset(None, shards[0], np.arange(10), 1, hook.Split.train, config)


def test_other_dataset_classes_are_refused(shards: list[str], tmp_path: Path) -> None:
    config = config_of(data_arguments("weighted", shards[:2], shards[2], tmp_path), tmp_path)
    with pytest.raises(UserError, match="MockGPTDataset cannot be narrowed"):
        build(config, select(tmp_path / "selection", every_third(shards)), kind=MockGPTDataset)


@pytest.mark.parametrize(
    "flag", ["--dataloader-fast-cache-load", "--dataloader-defer-npy-index-mmap", "--mock-data", "--sft"]
)
def test_flags_that_bypass_the_selection_are_refused_at_once(flag: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{flag} cannot be used with a selection"):
        main(["--selection", str(tmp_path), str(PACKAGED_SCRIPT), flag])


@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)", "raise SystemExit(3)"])
def test_a_script_that_passes_the_selection_over_is_refused(
    ending: str, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_bliss.mcore import platform

    monkeypatch.setattr(platform, "install", lambda: None)  # it would change torch for the tests after this one
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("sys.argv", [])
    monkeypatch.setattr("sys.path", list(sys.path))
    select(tmp_path / "selection", every_third(shards))
    (tmp_path / "script.py").write_text(ending)
    words = ["--selection", str(tmp_path / "selection"), str(tmp_path / "script.py")]
    with pytest.raises(SystemExit if "3" in ending else UserError, match="3" if "3" in ending else "did not read"):
        main(words)
    if not ending:
        build_it = "from megatron_bliss.mcore.dataset import SelectedDatasetBuilder as B; B.is_used = True"
        (tmp_path / "script.py").write_text(build_it)
        main(words)


def test_a_missing_script_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.py does not exist"):
        main([str(tmp_path / "nowhere.py"), "--num-layers", "2"])


def test_verify_says_what_would_be_read(shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    selection = select(tmp_path / "selection", every_third(shards))
    main(["--selection", str(tmp_path / "selection"), "--verify", "pretrain_gpt.py"])
    shown = capsys.readouterr().out
    assert selection.digest[:12] in shown
    assert f"{shards[0]} (a): 67 of 200 sequences" in shown
    with pytest.raises(UserError, match="--verify needs --selection"):
        main(["--verify", "pretrain_gpt.py"])


def test_the_hook_takes_a_copied_shard_without_reading_all_of_it(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_bliss.data import shards as reading

    selection = select(tmp_path / "selection", every_third([copied(prefix, tmp_path) for prefix in shards[:2]]))
    prefix = selection.shards[0].record.prefix
    os.utime(f"{prefix}.bin", ns=(0, 0))
    digested: list[Path] = []
    monkeypatch.setattr(reading, "digest_file", lambda path: digested.append(path) or "")
    Selection.open(selection.directory, in_full=False)
    assert not digested
    with pytest.raises(UserError, match="is not the one this run was started with"):
        Selection.open(selection.directory)  # in full, which the patched digest refuses
    assert digested
    for other, match in ((np.fromfile(f"{prefix}.bin", np.int32)[::-1], "is not the one"), (b"\0" * 8, "truncated")):
        Path(f"{prefix}.bin").write_bytes(bytes(other))
        with pytest.raises(UserError, match=match):
            Selection.open(selection.directory, in_full=False)


def copied(prefix: str, folder: Path) -> str:
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prefix}{suffix}", folder)
    return str(folder / Path(prefix).name)


def test_no_list_of_all_ids_is_made(shards: list[str], tmp_path: Path) -> None:
    """What Megatron gets are the bytes of the selection's file."""
    config = config_of(data_arguments("single", shards, shards[2], tmp_path), tmp_path)
    selection = select(tmp_path / "selection", {shards[0]: np.arange(1, 200, 3)})
    train, _, _ = build(config, selection, num_samples=10)
    assert np.shares_memory(train.indices, selection.ids(shards[0]))
    assert len(train.indices) == 60  # below 180, the end of the training split


def test_changed_ids_are_seen_when_an_index_is_built_of_them(shards: list[str], tmp_path: Path) -> None:
    config = config_of(data_arguments("single", shards, shards[2], tmp_path), tmp_path)
    kept = select(tmp_path / "selection", {shards[0]: np.arange(1, 200, 3)})
    ids = np.array(kept.ids(shards[0]))
    ids[5] += 1
    np.save(tmp_path / "selection" / "a.npy", ids)
    selection = Selection.open(tmp_path / "selection", in_full=False)
    with pytest.raises(UserError, match=r"a\.npy is missing or changed"):
        build(config, selection, num_samples=10)
    with pytest.raises(UserError, match=r"a\.npy is missing or changed"):
        Selection.open(tmp_path / "selection")
    np.save(tmp_path / "fewer.npy", ids[:-1])
    fewer = (tmp_path / "fewer.npy").read_bytes()
    for content, sentence in ((b"", "missing or changed"), (fewer[:-8], "missing or changed"), (fewer, "not hold")):
        (tmp_path / "selection" / "a.npy").write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            Selection.open(tmp_path / "selection", in_full=False)
