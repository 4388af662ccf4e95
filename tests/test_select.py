"""The select stage on run directories and on bare scores: sizes, quotas, noise, the whole pool, and bad input."""

import os
import resource
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.utils import get_blend_from_list
from typer.testing import CliRunner

from megatron_bliss.artifacts import RunPaths, read_json, write_json
from megatron_bliss.cli import app
from megatron_bliss.config import control_config, load_config, read_saved_config, save_config
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.ledger import Ledger
from megatron_bliss.data.scores import SCHEMA, ScoreFiles, ScoreWriter
from megatron_bliss.data.selection import Selection
from megatron_bliss.data.shards import Shard, ShardRecord, ShardWriter, take_inventory
from megatron_bliss.data.slices import HELD_OUT, Slicing
from megatron_bliss.errors import UserError
from megatron_bliss.orchestration.plan import plan
from megatron_bliss.stages import inventory as inventory_stage
from megatron_bliss.stages import score_shards, select, select_scores
from tests.toy_shards import records_of, write_run, write_shard

SIZES = {"a": [400, 300], "bb": [500], "ccc": [200]}
LONGEST = 20  # tokens, of any sequence


def score_all(
    directory: Path, records: list[ShardRecord], wanted: dict[str, np.ndarray], method: str = "bliss"
) -> None:
    """Scores that are normal, larger in later domains, the same for the same sequence."""
    writer = ScoreWriter(directory, records, wanted, method=method, model_digest="m", seed=1, chunk_sequences=100)
    for chunk in list(writer.pending()):
        rng = np.random.default_rng(len(chunk.record.name) + chunk.record.num_sequences)
        scores = rng.standard_normal(chunk.record.num_sequences, dtype=np.float32)
        writer.write(chunk, scores[chunk.ids] + np.float32(len(chunk.record.domain)))


def start(directory: Path, *overrides: str, rounds: int = 1) -> Path:
    """A run with an inventory, a warm-up selection and scores of some rounds."""
    write_run(directory, SIZES, list(overrides))
    inventory_stage.run(directory)
    select.run(directory, None)
    paths, config = RunPaths(directory), read_saved_config(RunPaths(directory).config)
    records = Inventory.read(paths.inventory).pool
    for number in range(1, rounds + 1):
        wanted = Slicing.of(config, Inventory.read(paths.inventory)).ids_by_name(number)
        score_all(paths.scores(number), records, wanted)
    return directory


def kept_of(run_dir: Path, number: int = 1) -> Selection:
    return Selection.open(RunPaths(run_dir).selection(number))


def with_settings(run_dir: Path, *overrides: str) -> Path:
    """The same run with other settings of the selection."""
    path = RunPaths(run_dir).config
    save_config(load_config(path, list(overrides)), path)
    return run_dir


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(tmp_path_factory.mktemp("scored") / "run")


@pytest.fixture
def run_dir(scored: Path) -> Path:
    (scored / "run.yaml").unlink()
    write_run(scored, SIZES)
    return scored


# --- how much is kept


def test_a_number_of_tokens(run_dir: Path) -> None:
    select.run(with_settings(run_dir, "selection.tokens=1000", "selection.fraction=null"), 1)
    selection = kept_of(run_dir)
    assert 0 <= 1000 - selection.counts.kept_tokens < LONGEST
    assert selection.manifest["requested_tokens"] == 1000
    assert selection.manifest["settings"]["fraction"] is None
    with pytest.raises(UserError, match=r"selection.tokens=999999 asks for 999999 tokens, and \d+ are to be had"):
        select.run(with_settings(run_dir, "selection.tokens=999999"), 1)
    assert kept_of(run_dir).digest == selection.digest  # what was there stays


def test_a_threshold(run_dir: Path) -> None:
    select.run(with_settings(run_dir, "selection.fraction=null", "selection.threshold=2.5"), 1)
    selection = kept_of(run_dir)
    assert selection.manifest["requested_tokens"] is None
    for shard in selection.shards:
        scores = np.load(RunPaths(run_dir).scores(1) / f"{shard.record.name}.npy")
        assert shard.ids.tolist() == np.flatnonzero(scores >= 2.5).tolist()  # NaN of other slices is not
    assert selection.manifest["thresholds"]["a"] >= 2.5
    with pytest.raises(UserError, match="would be empty"):
        select.run(with_settings(run_dir, "selection.threshold=99"), 1)


def test_a_number_of_tokens_is_shared_out_by_domain_with_keep(run_dir: Path) -> None:
    select.run(with_settings(run_dir, "selection.fraction=null", "selection.tokens=1500", "selection.blend=keep"), 1)
    selection = kept_of(run_dir)
    for counts in selection.domains.values():
        assert 0 <= 1500 * counts.slice_tokens / selection.counts.slice_tokens - counts.kept_tokens < LONGEST + 1


def test_lengths(run_dir: Path) -> None:
    select.run(with_settings(run_dir, "selection.min_length=5", "selection.max_length=8", "selection.fraction=0.5"), 1)
    selection = kept_of(run_dir)
    slicing = Slicing.of(read_saved_config(run_dir / "run.yaml"), Inventory.read(run_dir / "inventory.json"))
    for shard in selection.shards:
        lengths = Shard(shard.record.prefix).sequence_lengths
        offered = lengths[slicing.ids(shard.record, 1)]
        offered = offered[(offered >= 5) & (offered <= 8)]
        assert (shard.counts.slice_sequences, shard.counts.slice_tokens) == (len(offered), offered.sum())
        assert set(lengths[shard.ids]) <= {5, 6, 7, 8}
    assert 0 <= 0.5 * selection.counts.slice_tokens - selection.counts.kept_tokens < 9


def test_quotas(run_dir: Path) -> None:
    select.run(run_dir, 1)
    free = kept_of(run_dir)
    shares = {domain: counts.kept_tokens / free.counts.kept_tokens for domain, counts in free.domains.items()}
    assert shares["ccc"] > 0.3 > 0.2 > shares["a"]
    quotas = ("selection.quotas.ccc.maximum=0.3", "selection.quotas.a.minimum=0.2")
    select.run(with_settings(run_dir, *quotas), 1)
    selection = kept_of(run_dir)
    requested = selection.manifest["requested_tokens"]
    kept = {domain: counts.kept_tokens for domain, counts in selection.domains.items()}
    assert 0 <= 0.3 * requested - kept["ccc"] < LONGEST + 1
    assert 0 <= 0.2 * requested - kept["a"] < LONGEST + 1
    assert 0 <= 0.5 * requested - kept["bb"] < LONGEST + 3
    thresholds = selection.manifest["thresholds"]
    assert thresholds["a"] < thresholds["bb"] < thresholds["ccc"]
    with pytest.raises(UserError, match=r"too little of ccc; raise the maximums"):
        select.run(with_settings(run_dir, "selection.quotas.a.maximum=0.2", "selection.quotas.bb.maximum=0.1",
                                 "selection.quotas.ccc.maximum=1.0", "selection.fraction=0.9"), 1)  # fmt: skip


# --- noise


def test_gumbel_noise_draws_by_the_scores(run_dir: Path) -> None:
    select.run(run_dir, 1)
    best = kept_of(run_dir)
    digests = set()
    overlaps = []
    for temperature in (0.01, 1.0, 100.0):
        select.run(with_settings(run_dir, f"selection.temperature={temperature}"), 1)
        selection = kept_of(run_dir)
        digests.add(selection.digest)
        assert 0 <= 0.2 * selection.counts.slice_tokens - selection.counts.kept_tokens < LONGEST
        both = sum(len(np.intersect1d(x.ids, y.ids)) for x, y in zip(selection.shards, best.shards, strict=True))
        overlaps.append(both / best.counts.kept_sequences)
        select.run(run_dir, 1)
        assert kept_of(run_dir).digest == selection.digest
    assert overlaps[0] > 0.95 > overlaps[1] > overlaps[2]
    assert overlaps[2] == pytest.approx(0.2, abs=0.1)  # as good as blind
    assert len(digests) == 3


def test_gumbel_noise_is_gumbel() -> None:
    from megatron_bliss.data.candidates import Filters, ShardCandidates
    from tests.toy_shards import fake_record

    ids = np.arange(20_000, dtype=np.int32)
    noise = [
        ShardCandidates(fake_record(9), lambda span: ids, lambda ids: ids, Filters(), Ledger(), temperature, seed)
        ._perturbed(np.full(len(ids), 3, dtype=np.float32), ids) for temperature, seed in ((0.5, 1), (0.5, 2))
    ]  # fmt: skip
    assert abs(np.corrcoef(*noise)[0, 1]) < 0.05
    for values in noise:
        assert values.dtype == np.float32
        assert values.mean() - 6 == pytest.approx(0.5772, abs=5 * 1.283 / len(ids) ** 0.5)  # five standard errors
        assert values.std() == pytest.approx(1.2825, rel=0.03)


# --- blends


def test_the_blend_is_written_for_megatron(run_dir: Path) -> None:
    select.run(run_dir, 1)
    selection = kept_of(run_dir)
    words = (selection.directory / "blend.txt").read_text().split()  # as Megatron reads --data-args-path
    prefixes, weights = get_blend_from_list(words)
    assert list(zip(weights, prefixes, strict=True)) == selection.blend
    assert [tuple(part) for part in selection.manifest["blend"]] == selection.blend
    assert selection.manifest["direction"] == "higher is better"
    assert selection.manifest["domains"] == {domain: asdict(counts) for domain, counts in selection.domains.items()}
    assert selection.manifest["tokenizer"]["vocab_size"] == 100


# --- the whole pool


def test_rounds_on_the_whole_pool_take_nothing_twice(tmp_path: Path) -> None:
    run_dir = start(tmp_path / "run", "selection.pool=all", "selection.fraction=0.24", "rounds=4", rounds=4)
    paths = RunPaths(run_dir)
    for number in (1, 2, 3):
        select.run(run_dir, number)
    selections = [Selection.open(paths.warmup_selection), *(kept_of(run_dir, number) for number in (1, 2, 3))]
    slicing = Slicing.of(read_saved_config(paths.config), Inventory.read(paths.inventory))
    for position, record in enumerate(slicing.records):
        taken = np.concatenate([selection.shards[position].ids for selection in selections])
        assert len(np.unique(taken)) == len(taken)
        assert not np.isin(taken, slicing.ids(record, HELD_OUT)).any()
        uses = Ledger(selections).uses(record, 0, record.num_sequences)
        assert uses.tolist() == np.bincount(taken, minlength=record.num_sequences).tolist()
    for selection in selections[1:]:
        assert 0 <= 0.24 * selection.counts.slice_tokens - selection.counts.kept_tokens < LONGEST
        assert selection.manifest["repeated_tokens"] == 0
    before = {path.name: path.read_bytes() for path in paths.selection(2).iterdir()}
    select.run(run_dir, 2)  # again, with a later round there
    assert {path.name: path.read_bytes() for path in paths.selection(2).iterdir()} == before
    with_settings(run_dir, "selection.fraction=null", "selection.tokens=6000")
    with pytest.raises(UserError, match=r"taken by fewer than 1 earlier rounds; raise selection.max_repeats \(1\)"):
        select.run(run_dir, 4)
    assert not paths.selection(4).exists()

    stages = {stage.name: stage for stage in plan(read_saved_config(paths.config), run_dir)}
    assert {"warmup-select", "round-0001/score"} <= set(stages["round-0001/select"].needs)
    assert "round-0002/select" in stages["round-0003/select"].needs
    assert {paths.selection(1), paths.selection(2)} <= set(stages["round-0003/select"].inputs)


def test_repeats_take_the_least_used_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = start(
        tmp_path / "run", "selection.pool=all", "selection.fraction=0.6", "selection.max_repeats=2",
        "warmup.target_steps=0", "rounds=3", rounds=3,
    )  # fmt: skip
    for number in (1, 2):
        select.run(run_dir, number)
    assert "tokens are taken again, the least used first (selection.max_repeats=2)" in capsys.readouterr().out
    first, second = kept_of(run_dir, 1), kept_of(run_dir, 2)
    slicing = Slicing.of(read_saved_config(run_dir / "run.yaml"), Inventory.read(run_dir / "inventory.json"))
    again = 0
    for one, two in zip(first.shards, second.shards, strict=True):
        candidates = slicing.ids(one.record, 2)
        assert np.isin(np.setdiff1d(candidates, one.ids), two.ids).all()  # all that is new
        repeated = np.intersect1d(one.ids, two.ids)
        again += Shard(one.record.prefix).sequence_lengths[repeated].sum()
    assert second.manifest["repeated_tokens"] == again
    assert again == pytest.approx(0.2 * second.counts.slice_tokens, rel=0.05)
    select.run(run_dir, 3)
    third = kept_of(run_dir, 3)
    for record in slicing.records:
        uses = Ledger([first, second, third]).uses(record, 0, record.num_sequences)
        assert uses.max() <= 2
    assert third.manifest["repeated_tokens"] == third.counts.kept_tokens


# --- the command line


def test_a_dry_run_writes_nothing(run_dir: Path) -> None:
    select.run(run_dir, 1)
    before = kept_of(run_dir)
    times = {path: path.stat().st_mtime_ns for path in before.directory.iterdir()}
    result = CliRunner().invoke(
        app, ["select", "--run", str(run_dir), "--round", "1", "--dry-run"], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in before.directory.iterdir()} == times
    for domain, counts in before.domains.items():
        [line] = [line for line in result.output.splitlines() if f" {domain} " in line]
        assert f"{counts.slice_tokens:,}" in line
        assert f"{counts.kept_tokens:,}" in line
        assert f"{counts.kept_tokens / before.counts.kept_tokens:.2%}" in line
        assert f"{before.manifest['thresholds'][domain]:.6g}" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["select"], "--run DIR and --round N, or --scores DIR"),
        (["select", "--run", "/nowhere", "--round", "1", "fraction=1"], "has its settings in run.yaml"),
        (["select", "--scores", "/nowhere", "--round", "1"], "goes without --run and --round"),
        (["select", "--scores", "/nowhere"], "needs --output DIR"),
    ],
)
def test_options_that_do_not_go_together(words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)


# --- scores without a run


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores as tools/score_shards.py leaves them."""
    directory = tmp_path_factory.mktemp("bare")
    records = records_of(directory / "shards", {"web": [300, 200], "code": [250]})
    records = [type(record)(**asdict(record) | {"domain": ""}) for record in records]
    write_json(directory / "scores" / "shards.json", {"schema": 1, "shards": [asdict(record) for record in records]})
    wanted = {record.name: np.arange(record.num_sequences, dtype=np.int32) for record in records}
    score_all(directory / "scores", records, wanted)
    return directory


def test_scores_without_a_run(bare: Path, tmp_path: Path) -> None:
    words = ["select", "--scores", str(bare / "scores"), "--output"]
    settings = ["fraction=0.3", "domains.web=web*", "domains.code=code*", "quotas.code.maximum=0.1"]
    result = CliRunner().invoke(app, [*words, str(tmp_path / "one"), *settings])
    assert result.exit_code == 0, (result.output, result.exception)
    one = Selection.open(tmp_path / "one")
    assert 0 <= 0.3 * one.counts.slice_tokens - one.counts.kept_tokens < 2 * LONGEST
    assert one.counts.slice_sequences == 750
    assert one.domains["code"].kept_tokens <= 0.1 * one.manifest["requested_tokens"]
    assert one.manifest["round"] is None
    result = CliRunner().invoke(app, [*words, str(tmp_path / "two"), "--earlier", str(tmp_path / "one"), "tokens=900"])
    assert result.exit_code == 0, (result.output, result.exception)
    two = Selection.open(tmp_path / "two")
    assert 0 <= 900 - two.counts.kept_tokens < LONGEST
    for first, second in zip(one.shards, two.shards, strict=True):
        assert not np.isin(second.ids, first.ids).any()


@pytest.mark.parametrize("place", ["scores", "scores/manifest.json", "."])
def test_what_is_no_selection_stays(bare: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bare)
    before = {path: path.read_bytes() for path in bare.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds something else than a selection"):
        select_scores.run(bare / "scores", Path(place), [], [])
    assert {path: path.read_bytes() for path in bare.rglob("*") if path.is_file()} == before


def test_an_earlier_selection_is_not_overwritten(bare: Path, tmp_path: Path) -> None:
    select_scores.run(bare / "scores", tmp_path / "one", [], [])
    with pytest.raises(UserError, match="is an --earlier selection too"):
        select_scores.run(bare / "scores", tmp_path / "one", [], [tmp_path / "one"])


def test_scores_and_selections_are_told_apart(bare: Path, tmp_path: Path, run_dir: Path) -> None:
    select_scores.run(bare / "scores", tmp_path / "one", [], [])
    with pytest.raises(UserError, match=r"one holds a selection, not scores; give a directory that `megatron-bliss sc"):
        select_scores.run(tmp_path / "one", tmp_path / "two", [], [])
    for use in (
        lambda scores: Selection.open(scores),
        lambda scores: select_scores.run(scores, tmp_path / "two", [], [scores]),
    ):
        with pytest.raises(UserError, match=r"scores holds scores, not a selection; give a directory that `megatron-b"):
            use(bare / "scores")
    of_run = RunPaths(run_dir).scores(1)
    ScoreFiles(of_run)
    with pytest.raises(UserError, match=r"has no shards.json.* with --run DIR --round N"):
        select_scores.run(of_run, tmp_path / "two", [], [])
    assert not (tmp_path / "two").exists()
    with pytest.raises(UserError, match="one holds something else than scores of --shards; give another --out"):
        score_shards._list_shards([], read_saved_config(run_dir / "run.yaml"), tmp_path / "one" / "shards.json")
    assert not (tmp_path / "one" / "shards.json").exists()


@pytest.mark.parametrize("settings", [["threshold=8"], ["tokens=1"]])
def test_nothing_but_sequences_without_a_token(tmp_path: Path, settings: list[str]) -> None:
    for name, lengths in {"some": (0, 5, 0), "none": (0,)}.items():
        with ShardWriter(tmp_path / name, np.uint16) as shard:
            for length in lengths:
                shard.add_document([[1] * length])
    records = take_inventory({"": [str(tmp_path / "some"), str(tmp_path / "none")]})
    write_json(tmp_path / "scores/shards.json", {"schema": 1, "shards": [asdict(record) for record in records]})
    wanted = {record.name: np.arange(record.num_sequences, dtype=np.int32) for record in records}
    writer = ScoreWriter(tmp_path / "scores", records, wanted, method="bliss", model_digest="m", seed=1,
                         chunk_sequences=100)  # fmt: skip
    for chunk, scores in zip(list(writer.pending()), ([9, 1, 9], [9]), strict=True):
        writer.write(chunk, np.array(scores, dtype=np.float32))
    for output in (None, tmp_path / "out"):
        with pytest.raises(UserError, match="the selection would be empty"):
            select_scores.run(tmp_path / "scores", output, settings, [], dry_run=output is None)
    assert not (tmp_path / "out").exists()
    select_scores.run(tmp_path / "scores", tmp_path / "out", ["fraction=1"], [])
    selection = Selection.open(tmp_path / "out")
    assert selection.blend == [(1.0, records[0].prefix)]
    assert selection.dropped == [records[1].prefix]


def test_maximums_that_leave_nothing_over(bare: Path, tmp_path: Path) -> None:
    """They are rounded down to tokens, so they sum to one less than an odd budget."""
    domains = ["domains.web=web*", "domains.code=code*", "quotas.web.maximum=0.5", "quotas.code.maximum=0.5"]
    select_scores.run(bare / "scores", tmp_path / "out", ["tokens=901", *domains], [])
    selection = Selection.open(tmp_path / "out")
    assert selection.manifest["requested_tokens"] == 900
    for counts in selection.domains.values():
        assert 0 <= 450 - counts.kept_tokens < LONGEST


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["fraction"], "is not a setting"),
        (["size=3"], "size"),
        (["fraction=x"], "fraction"),
        (["fraction=0.1", "tokens=9"], "selection.fraction and selection.tokens"),
        (["domains.web=web*"], "shard code0 fits none of web"),
        (["weights.x=1"], "weights are given for x"),
        (["quotas.x.maximum=0.5"], "names domain 'x'; the pool has all"),
        (["blend=x"], "selection.blend is 'x'; it must be one of"),
        (["pool=slice"], "pool is 'slice'; scores without a run have no slices"),
        (["weights.all=-1"], "domain 'all' weight -1.0; it must be above 0"),
        (["threshold=nan"], "selection.threshold is nan"),
        (["threshold=1e40"], "it must be a number that a float32 can hold"),
        (["tokens=999999"], "asks for 999999 tokens, and [0-9]+ are to be had; use a larger pool or ask for less"),
    ],
)
def test_bad_settings_without_a_run(bare: Path, tmp_path: Path, settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        select_scores.run(bare / "scores", tmp_path / "out", settings, [])
    assert not list(tmp_path.iterdir())


# --- bad input


def change_score(path: Path, value: float) -> None:
    scores = np.load(path)
    scores[np.flatnonzero(~np.isnan(scores))[3]] = value
    np.save(path, scores)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated bin": (lambda run: truncate(run.parent / "shards" / "a0.bin"), r"a0.bin has \d+ bytes"),
    "truncated idx": (lambda run: truncate(run.parent / "shards" / "a0.idx"), r"a0.idx has \d+ bytes"),
    "other dtype": (lambda run: write_shard(run.parent / "shards" / "a0", 400, 1, np.int32), "its digest changed"),
    "changed shard": (lambda run: write_shard(run.parent / "shards" / "a0", 400, 99), "its digest changed"),
    "NaN": (lambda run: change_score(run / "round-0001/scores/a0.npy", np.nan), "no score for 1 of the"),
    "changed scores": (
        lambda run: change_score(run / "round-0001/scores/a0.npy", 0.5), "a0.npy has changed since it was scored",
    ),
    "short scores": (
        lambda run: np.save(run / "round-0001/scores/a0.npy", np.zeros(7, np.float32)), r"needs float32 \[400\]",
    ),
    "scores of another dtype": (
        lambda run: np.save(run / "round-0001/scores/a0.npy", np.zeros(400)), r"float64 \[400\], its shard",
    ),
    "no score file": (lambda run: (run / "round-0001/scores/a0.npy").unlink(), "does not exist"),
    "unfinished scores": (
        lambda run: (run / "round-0001/scores/manifest.json").rename(run / "round-0001/scores/.unfinished-x"),
        "not scored to its end",
    ),
    "something else in the way": (
        lambda run: (run / "round-0001/selection/manifest.json").unlink(), "something else than a selection",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_clear_error(tmp_path: Path, kind: str) -> None:
    run_dir = start(tmp_path / "run")
    select.run(run_dir, 1)
    spoil, message = BAD[kind]
    spoil(run_dir)
    directory = RunPaths(run_dir).round(1)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        select.run(run_dir, 1)
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in directory.iterdir()) == ["scores", "selection"]


def test_scores_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    run_dir = start(tmp_path / "run")
    manifest = RunPaths(run_dir).scores(1) / "manifest.json"
    facts = {"type": "SentencePieceTokenizer", "model_sha256": None, "vocab_size": 101}
    write_json(manifest, read_json(manifest, SCHEMA) | {"tokenizer": facts})
    with pytest.raises(UserError, match="another tokenizer"):
        select.run(run_dir, 1)
    write_json(manifest, read_json(manifest, SCHEMA) | {"tokenizer": facts | {"vocab_size": 100}})
    select.run(run_dir, 1)


def test_a_tokenizer_that_is_not_there_is_no_other_one(tmp_path: Path) -> None:
    run_dir = start(tmp_path / "run", "data.tokenizer.model=shards/tokenizer.model")
    manifest = RunPaths(run_dir).scores(1) / "manifest.json"
    facts = {"type": "SentencePieceTokenizer", "model_sha256": "0" * 64, "vocab_size": 100}
    write_json(manifest, read_json(manifest, SCHEMA) | {"tokenizer": facts})
    with pytest.raises(UserError, match=r"data\.tokenizer\.model shards/tokenizer\.model is not there, seen from"):
        select.run(run_dir, 1)


def test_a_full_disk(run_dir: Path) -> None:
    """A limit on the size of files stands for it: the same error, at the same place."""
    select.run(run_dir, 1)
    before = kept_of(run_dir)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, old[1]))
    try:
        with pytest.raises(UserError, match=r"selection cannot be written \(File too large\); make room"):
            select.run(run_dir, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert kept_of(run_dir).digest == before.digest
    assert not list(before.directory.parent.glob(".selection*"))


def test_a_read_only_directory(bare: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    if os.access(closed, os.W_OK):  # nothing is closed to root
        closed = tmp_path / "file"
        closed.touch()
    with pytest.raises(UserError, match="out cannot be written"):
        select_scores.run(bare / "scores", closed / "out", [], [])


def test_a_kill_leaves_what_was_there(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    select.run(run_dir, 1)
    before = kept_of(run_dir)

    def killed(*_: object) -> None:
        os.kill(os.getpid(), 9)

    with monkeypatch.context() as patch:
        patch.setattr("megatron_bliss.stages.choice.write_manifest", killed)
        with_settings(run_dir, "selection.fraction=0.5")
        if (child := os.fork()) == 0:
            select.run(run_dir, 1)
        assert os.waitpid(child, 0)[1] == 9
    assert kept_of(run_dir).digest == before.digest
    assert (before.directory.parent / ".selection.unfinished").exists()
    select.run(run_dir, 1)
    assert kept_of(run_dir).counts.kept_tokens > before.counts.kept_tokens
    assert not list(before.directory.parent.glob(".selection*"))


# --- settings


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["selection.fraction=null"], "nothing says how much is kept"),
        (["selection.tokens=5", "selection.fraction=0.1"], "selection.fraction and selection.tokens says how much"),
        (["selection.tokens=0"], "selection.tokens is 0; it must be above 0"),
        (["selection.min_length=-1"], "selection.min_length is -1"),
        (["selection.min_length=9", "selection.max_length=8"], "selection.max_length is 8"),
        (["selection.temperature=-1"], "selection.temperature is -1.0"),
        (["selection.temperature=.nan"], "selection.temperature is nan"),
        (["selection.threshold=1", "selection.temperature=1"], "moves scores at random"),
        (["selection.threshold=1", "method=random"], "for one method's scores"),
        (["selection.threshold=1", "controls=[{name: r}]"], "for one method's scores"),
        (["selection.pool=some"], "selection.pool is 'some'"),
        (["selection.max_repeats=2"], "it needs selection.pool=all"),
        (["selection.pool=all", "selection.max_repeats=256"], "between 1 and 255"),
        (["selection.pool=all", "rounds=5"], "take 1.03 times the pool, and selection.max_repeats is 1; raise it"),
        (["selection.quotas.x.maximum=0.5"], "names domain 'x'; the pool has a, bb, ccc"),
        (["selection.quotas.a.maximum=0.5", "selection.blend=keep"], "need selection.blend=pool"),
        (["selection.quotas.a.maximum=0.5", "selection.threshold=1"], "need selection.blend=pool"),
        (["selection.quotas.a.minimum=0.6", "selection.quotas.a.maximum=0.5"], "minimum 0.6 and maximum 0.5"),
        (["selection.quotas.a.minimum=0.6", "selection.quotas.bb.minimum=0.6"], "minimums sum to 1.2"),
        ([f"selection.quotas.{domain}.maximum=0.3" for domain in SIZES], "maximums sum to 0.9, below 1"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, overrides: list[str], message: str) -> None:
    write_run(tmp_path / "run", SIZES)
    given = tmp_path / "run.settings.yaml"
    needed = ["data.validation=v", "data.tokenizer.vocab_size=100"]
    with pytest.raises(UserError, match=message):
        load_config(given, [*needed, *overrides])
    small = load_config(given, [*needed, "selection.tokens=500"]).selection
    assert (small.fraction, small.share(1000), small.share(100)) == (None, 0.5, 1.0)


def test_a_control_takes_as_much_more(tmp_path: Path) -> None:
    write_run(tmp_path / "run", SIZES)
    overrides = ["selection.tokens=500", "controls=[{name: r, method: random, steps_factor: 3}]"]
    config = load_config(
        tmp_path / "run.settings.yaml", ["data.validation=v", "data.tokenizer.vocab_size=9", *overrides]
    )
    arm = control_config(config, config.controls[0], tmp_path)
    assert (arm.selection.tokens, arm.selection.fraction) == (1500, None)
