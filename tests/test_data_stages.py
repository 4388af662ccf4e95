"""The inventory and select stages on run directories."""

from pathlib import Path

import numpy as np
import pytest

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.config import ControlConfig, control_config, read_saved_config, save_config
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.scores import ScoreWriter
from megatron_bliss.data.selection import Selection
from megatron_bliss.data.shards import Shard
from megatron_bliss.data.slices import HELD_OUT, Slicing
from megatron_bliss.data.validation import ValidationSet
from megatron_bliss.errors import UserError
from megatron_bliss.orchestration.plan import plan
from megatron_bliss.stages import inventory as inventory_stage
from megatron_bliss.stages import select as select_stage
from megatron_bliss.stages.inventory import run_inventory
from tests.toy_shards import write_run, write_shard

SIZES = {"a": [400, 300], "bb": [500]}


def start(directory: Path, *overrides: str) -> Path:
    """A run whose inventory was taken."""
    write_run(directory, SIZES, list(overrides))
    inventory_stage.run(directory)
    return directory


def slicing_of(run_dir: Path) -> Slicing:
    config = read_saved_config(RunPaths(run_dir).config)
    return Slicing.of(config, run_inventory(run_dir, config))


def write_scores(run_dir: Path, round_number: int, method: str, shift: dict[str, float] | None = None) -> None:
    """Scores equal to the sequence id, plus a constant by domain."""
    slicing = slicing_of(run_dir)
    directory = RunPaths(run_dir).scores(round_number)
    wanted = slicing.ids_by_name(round_number)
    writer = ScoreWriter(
        directory, slicing.records, wanted, method=method, model_digest="m", seed=1, chunk_sequences=50
    )
    for chunk in writer.pending():
        writer.write(chunk, chunk.ids.astype(np.float32) + np.float32((shift or {}).get(chunk.record.domain, 0)))


def control_of(run_dir: Path, name: str, **settings: object) -> Path:
    config = read_saved_config(RunPaths(run_dir).config)
    directory = RunPaths(run_dir).control(name).root
    arm = control_config(config, ControlConfig(name=name, **settings), run_dir)  # type: ignore[arg-type]
    save_config(arm, RunPaths(directory).config)
    return directory


# --- inventory


def test_inventory_lists_pool_validation_and_test(tmp_path: Path) -> None:
    run_dir = start(tmp_path / "run")
    inventory = Inventory.read(RunPaths(run_dir).inventory)
    assert [(record.name, record.domain, record.num_sequences) for record in inventory.records] == [
        ("a0", "a", 400), ("a1", "a", 300), ("bb0", "bb", 500), ("validation", "validation", 20), ("test", "test", 20),
    ]  # fmt: skip
    before = RunPaths(run_dir).inventory.stat().st_mtime_ns
    inventory_stage.run(run_dir)
    assert RunPaths(run_dir).inventory.stat().st_mtime_ns == before
    write_shard(tmp_path / "shards" / "a1", 300, seed=1234)
    with pytest.raises(UserError, match="its digest changed"):
        inventory_stage.run(run_dir)


def test_a_rewritten_mask_is_noticed(tmp_path: Path) -> None:
    run_dir = start(tmp_path / "run")
    plain = Inventory.read(RunPaths(run_dir).inventory)
    mask = Path(f"{plain.validation['validation'].prefix}.mask")
    values = np.ones(plain.validation["validation"].num_tokens, dtype=np.uint8)
    with open(mask, "wb") as stream:
        np.save(stream, values)
    for use in (lambda: inventory_stage.run(run_dir), lambda: ValidationSet.of(plain.validation["validation"])):
        with pytest.raises(UserError, match=r"\.mask is not what this run was started with"):
            use()
    masked = inventory_stage.collect(read_saved_config(RunPaths(run_dir).config))
    assert masked.digest != plain.digest
    assert (
        masked.validation["validation"].digest == plain.validation["validation"].digest
    )  # still the same data, if it were in the pool too
    assert len(ValidationSet.of(masked.validation["validation"])) == 20
    values[0] = 0
    with open(mask, "wb") as stream:
        np.save(stream, values)
    with pytest.raises(UserError, match="start a new run directory"):
        ValidationSet.of(masked.validation["validation"])
    assert mask in plan(read_saved_config(RunPaths(run_dir).config), run_dir)[0].inputs


def test_bad_shards_are_refused(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", SIZES)
    shards = tmp_path / "shards"

    config.data.tokenizer.vocab_size = 50
    with pytest.raises(UserError, match=r"has token id \d+, but data.tokenizer.vocab_size is 50"):
        inventory_stage.collect(config)
    config.data.tokenizer.vocab_size = 100

    config.data.validation = write_shard(shards / "wide", 20, seed=5, dtype=np.int32)
    with pytest.raises(UserError, match="has int32 tokens"):
        inventory_stage.collect(config)

    config.data.validation = str(shards / "a1")
    with pytest.raises(UserError, match="are the same data"):
        inventory_stage.collect(config)

    # also when it is a copy under another name
    for suffix in (".bin", ".idx"):
        (shards / f"copy{suffix}").write_bytes((shards / f"bb0{suffix}").read_bytes())
    config.data.validation = str(shards / "copy")
    with pytest.raises(UserError, match="keep validation and test data out of the pool"):
        inventory_stage.collect(config)

    config.data.validation = write_shard(shards / "empty", 0, seed=5)
    with pytest.raises(UserError, match="has no sequence in it"):
        inventory_stage.collect(config)


# --- select


def test_warmup_keeps_a_random_part_of_slice_0(tmp_path: Path) -> None:
    run_dir = start(tmp_path / "run", "warmup.fraction=0.3")
    select_stage.run(run_dir, None)
    selection = Selection.open(RunPaths(run_dir).warmup_selection)
    slicing = slicing_of(run_dir)
    for shard in selection.shards:
        assert np.isin(shard.ids, slicing.ids(shard.record, 0)).all()
        assert not np.isin(shard.ids, slicing.ids(shard.record, HELD_OUT)).any()
        lengths = Shard(shard.record.prefix).sequence_lengths
        assert shard.counts.kept_tokens == lengths[shard.ids].sum()
        assert shard.weight == pytest.approx(shard.counts.kept_tokens / selection.counts.kept_tokens)
    assert 0 <= 0.3 * selection.counts.slice_tokens - selection.counts.kept_tokens < 21  # one sequence has at most 20
    assert set(selection.domains) == {"a", "bb"}


def test_a_round_keeps_the_best_of_its_slice_over_the_whole_pool(tmp_path: Path) -> None:
    run_dir = start(tmp_path / "run", "selection.fraction=0.25")
    with pytest.raises(UserError, match="run the stage that writes it first"):
        select_stage.run(run_dir, 1)
    write_scores(run_dir, 1, "bliss", shift={"bb": 1000})
    select_stage.run(run_dir, 1)
    selection = Selection.open(RunPaths(run_dir).selection(1))
    assert 0 <= 0.25 * selection.counts.slice_tokens - selection.counts.kept_tokens < 21
    assert selection.domains["a"].kept_sequences == 0  # the other domain has every better score
    assert selection.dropped == [shard.record.prefix for shard in selection.shards[:2]]
    [(weight, prefix)] = selection.blend
    assert weight == 1
    candidates = slicing_of(run_dir).ids(selection.shards[2].record, 1)
    np.testing.assert_array_equal(selection.ids(prefix), candidates[-len(selection.ids(prefix)) :])
    assert set(selection.manifest["sources"]) == {"inventory", "scores"}
    assert selection.manifest["thresholds"]["bb"] == 1000 + selection.ids(prefix)[0]
    before = {path.name: path.read_bytes() for path in selection.directory.iterdir()}
    select_stage.run(run_dir, 1)
    assert {path.name: path.read_bytes() for path in selection.directory.iterdir()} == before


@pytest.mark.parametrize(("policy", "share"), [("keep", 0.9), ("score", None)])
def test_other_blends_keep_the_fraction_within_each_domain(tmp_path: Path, policy: str, share: float | None) -> None:
    config = write_run(tmp_path / "run", SIZES, [f"selection.blend={policy}"])
    config.data.pool[0].weight, config.data.pool[1].weight = 9.0, 1.0
    save_config(config, tmp_path / "run" / "run.yaml")
    inventory_stage.run(tmp_path / "run")
    write_scores(tmp_path / "run", 1, "bliss", shift={"bb": 1000})
    select_stage.run(tmp_path / "run", 1)
    selection = Selection.open(RunPaths(tmp_path / "run").selection(1))
    for counts in selection.domains.values():
        assert 0 <= 0.2 * counts.slice_tokens - counts.kept_tokens < 21
    weight_of_a = sum(shard.weight for shard in selection.shards if shard.record.domain == "a")
    if share is None:  # all of b ranks above all of a
        tokens = {d: sum(s.record.num_tokens for s in selection.shards if s.record.domain == d) for d in SIZES}
        n = {domain: counts.slice_sequences for domain, counts in selection.domains.items()}
        rank_a, rank_b = n["a"] / 2 / sum(n.values()), (n["a"] + n["bb"] / 2) / sum(n.values())
        share = tokens["a"] * rank_a / (tokens["a"] * rank_a + tokens["bb"] * rank_b)
    assert weight_of_a == pytest.approx(share)


def test_a_random_control_differs_from_the_warmup_and_between_rounds(tmp_path: Path) -> None:
    run_dir = start(tmp_path / "run")
    arm = control_of(run_dir, "random", method="random", steps_factor=3.0)
    other = control_of(run_dir, "again", method="random", steps_factor=3.0)
    select_stage.run(arm, None)  # has the warm-up of the run above
    assert not RunPaths(arm).warmup_selection.exists()
    for directory in (arm, other):
        select_stage.run(directory, 1)
    selection, others = (Selection.open(RunPaths(directory).selection(1)) for directory in (arm, other))
    assert selection.counts.kept_tokens == pytest.approx(0.6 * selection.counts.slice_tokens, abs=21)
    slicing = slicing_of(run_dir)
    for shard in selection.shards:
        assert np.isin(shard.ids, slicing.ids(shard.record, 1)).all()
    assert selection.digest != others.digest
    config, main = read_saved_config(RunPaths(run_dir).config), RunPaths(run_dir)
    arm_config = read_saved_config(RunPaths(arm).config)
    seeds = [select_stage.selection_seed(config, main, number) for number in (None, 1, 2)]
    seeds += [select_stage.selection_seed(arm_config, RunPaths(directory), 1) for directory in (arm, other)]
    assert len(set(seeds)) == 5


def test_perplexity_middle_is_centred_on_the_slice(tmp_path: Path) -> None:
    run_dir = start(tmp_path / "run", "method=perplexity", "perplexity.keep=middle")
    write_scores(run_dir, 1, "perplexity-middle")
    select_stage.run(run_dir, 1)
    selection = Selection.open(RunPaths(run_dir).selection(1))
    slicing = slicing_of(run_dir)
    everything = np.concatenate([slicing.ids(shard.record, 1) for shard in selection.shards])
    kept = np.concatenate([shard.ids for shard in selection.shards])
    distance = np.abs(kept - np.median(everything)).max()
    left_out = np.setdiff1d(everything, kept)
    assert np.abs(left_out - np.median(everything)).min() >= distance - 1


def test_scores_of_another_method_are_refused(tmp_path: Path) -> None:
    run_dir = start(tmp_path / "run")
    write_scores(run_dir, 1, "perplexity-low")
    with pytest.raises(UserError, match="holds scores of 'perplexity-low'"):
        select_stage.run(run_dir, 1)
