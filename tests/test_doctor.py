"""`megatron-bliss doctor`: made-up machines, this one, broken shards, tokenizers that do not fit."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_bliss.config import DomainConfig, RunConfig, load_config
from megatron_bliss.data.shards import Shard, ShardWriter
from megatron_bliss.data.tokenizers import Tokenizer, train_sentencepiece
from megatron_bliss.doctor import data, examination, machine, storage
from megatron_bliss.doctor.examination import examine
from megatron_bliss.doctor.findings import Finding, can_run
from megatron_bliss.doctor.machine import Gpu, Machine, Slurm
from megatron_bliss.errors import UserError
from tests.small_text import documents
from tests.tiny_run import megatron_bliss

VOCAB_SIZE = 360


def named(findings: list[Finding], name: str) -> Finding:
    [found] = [finding for finding in findings if finding.name == name]
    return found


# --- machines


VERSIONS: dict[str, str | None] = dict.fromkeys(machine.PACKAGES, "1.0")
H100 = Gpu("H100", 80 << 30, (9, 0))
CLUSTER_NODE = Machine(
    "3.12.1", VERSIONS, gpus=(H100,) * 8, has_nvidia_device=True, torch_cuda="13.0", nccl="2.28",
    import_errors={"Transformer Engine": None, "Apex": None, "Apex weight gradient": None},
    slurm=Slurm("25.05", answers=True), cores=96, memory=1 << 40, shared_memory=1 << 39, max_map_count=1 << 20,
)  # fmt: skip
CONFIG = RunConfig()
CONFIG.launch.nproc_per_node = 8


def test_a_complete_machine_has_no_gap() -> None:
    assert {finding.status for finding in machine.check_machine(CLUSTER_NODE, CONFIG)} == {"ok"}


@pytest.mark.parametrize(
    ("change", "name", "status", "words"),
    [
        ({"versions": VERSIONS | {"numpy": None}}, "numpy", "broken", "pip install numpy"),
        ({"versions": VERSIONS | {"lm-eval": None}}, "lm-eval", "gap", "megatron-bliss[eval]"),
        ({"gpus": (H100,) * 4}, "ranks", "broken", "launch.nproc_per_node=4"),
        ({"nccl": None}, "NCCL", "broken", "torch"),
        ({"gpus": ()}, "GPUs", "broken", "CUDA_VISIBLE_DEVICES=-1"),
        ({"gpus": (), "hides_gpus": True}, "GPUs", "gap", "none; 96 CPU cores"),
        ({"gpus": (), "has_nvidia_device": False, "cores": 2}, "ranks", "gap", "8 ranks × 1 stage on 2 cores"),
        ({"import_errors": {}}, "Transformer Engine", "gap", "pip install"),
        ({"import_errors": {"Transformer Engine": None}}, "Apex", "gap", "--cuda_ext"),
        ({"slurm": None}, "Slurm", "gap", "this machine only"),
        ({"slurm": Slurm("25.05", answers=False)}, "Slurm", "gap", "scontrol ping"),
        ({"shared_memory": 64 << 20}, "shared memory", "gap", "--ipc=host"),
        ({"max_map_count": 4096}, "mmap limit", "broken", "sysctl -w vm.max_map_count="),
    ],
)
def test_each_gap_is_named_with_its_cost_and_remedy(change: dict, name: str, status: str, words: str) -> None:
    found = named(machine.check_machine(replace(CLUSTER_NODE, **change), CONFIG), name)
    assert found.status == status
    assert found.costs
    assert words in f"{found.value} {found.costs} {found.remedy}"


def test_what_the_settings_ask_for_decides() -> None:
    bare = replace(CLUSTER_NODE, import_errors={}, gpus=(replace(H100, capability=(7, 0)),) * 8)
    assert can_run(machine.check_machine(bare, CONFIG))
    config = RunConfig()
    config.target.context_parallel, config.target.model.bf16 = 2, True
    findings = machine.check_machine(bare, config)
    assert named(findings, "context parallelism").status == "broken"
    assert named(findings, "bfloat16").status == "gap"
    few_maps = replace(CLUSTER_NODE, max_map_count=65530)
    assert machine.check_maps(few_maps, config).status == "ok"
    config.data.pool[:] = [DomainConfig("web", [f"web-{index}" for index in range(10_000)])]
    assert machine.check_maps(few_maps, config).status == "broken"


# --- file systems


def test_a_directory_that_holds_what_a_run_needs_is_left_as_it_was(tmp_path: Path) -> None:
    findings = storage.check_run_directory(tmp_path / "runs" / "new")
    assert [(finding.name, finding.status) for finding in findings] == [("atomic writes", "ok"), ("file locks", "ok")]
    assert not list(tmp_path.iterdir())


def test_what_a_file_system_cannot_do_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", lambda *_: None)  # as on mounts without locks that hold
    assert named(storage.check_run_directory(tmp_path), "file locks").status == "broken"

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.replace", refuse)
    found = named(storage.check_run_directory(tmp_path), "atomic writes")
    assert found.status == "broken"
    assert "Operation not supported" in found.value
    assert not list(tmp_path.iterdir())


def test_free_space_is_held_against_what_is_still_to_be_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert storage.check_space(tmp_path, free // 2).status == "ok"
    assert storage.check_space(tmp_path, 2 * free).status == "broken"
    run = tmp_path / "run"
    run.mkdir()
    with open(run / "checkpoint", "wb") as stream:
        stream.truncate(2 * free)  # sparse: its size counts, as if the run had written it already
    assert storage.check_space(run, 2 * free + 1000).status == "ok"


# --- data


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Of the texts, of other texts with as many pieces, and smaller."""
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = documents(60)
    backwards = [text[::-1] for text in texts]
    return {
        "right": train_sentencepiece(texts, folder / "right.model", VOCAB_SIZE),
        "other": train_sentencepiece(backwards, folder / "other.model", VOCAB_SIZE),
        "small": train_sentencepiece(texts, folder / "small.model", 300),
    }


@pytest.fixture
def config(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> RunConfig:
    """Of sound shards in `tmp_path`, made with the right tokenizer."""
    right = tokenizers["right"]
    for seed, name in enumerate(("a", "b", "validation")):
        with ShardWriter(tmp_path / name, np.uint16) as writer:
            for ids in right.encode_batch(documents(40, seed)):
                whole = [*ids, right.eod]
                writer.add_document([whole[:16], whole[16:]])
    np.save(tmp_path / "mask.npy", np.ones(Shard(tmp_path / "validation").num_tokens, dtype=np.uint8))
    (tmp_path / "mask.npy").rename(tmp_path / "validation.mask")
    settings = {
        "pool": [{"name": "words", "prefixes": [str(tmp_path / "a"), str(tmp_path / "b")]}],
        "validation": str(tmp_path / "validation"),
        "tokenizer": {"model": str(right.path), "vocab_size": VOCAB_SIZE},
    }
    path = tmp_path / "settings.yaml"
    path.write_text(str({"data": settings, "target": {"model": {"preset": "tiny"}, "global_batch_size": 8}}))
    return load_config(path, [])


def look(config: RunConfig, in_full: bool = False) -> list[Finding]:
    return data.check_data(config, [("validation", config.data.validation)], in_full)


def test_sound_data_have_no_gap(config: RunConfig) -> None:
    findings = look(config) + look(config, in_full=True)
    assert {finding.status for finding in findings} == {"ok"}, findings
    words = " ".join(finding.value for finding in findings)
    assert "2 shards, 160 sequences" in words
    assert "100% of sampled documents end with id 2" in words
    assert "mask: 100.0% carry loss" in words


def truncate(prefix: Path) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:-100])


def shift_an_offset(prefix: Path) -> None:
    """The seventh of 80 sequences begins a token late; both files keep their length."""
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    place = 34 + 4 * 80 + 8 * 6
    content[place : place + 8] = struct.pack("<q", struct.unpack("<q", content[place : place + 8])[0] + 2)
    path.write_bytes(content)


def raise_an_id(prefix: Path) -> None:
    tokens = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
    tokens[200] = VOCAB_SIZE + 7
    tokens.tofile(f"{prefix}.bin")


def lose_the_index(prefix: Path) -> None:
    Path(f"{prefix}.idx").unlink()


def copy_the_validation_set(prefix: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(prefix.with_name(f"validation{suffix}"), f"{prefix}{suffix}")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "b.bin has"),
        (shift_an_offset, "what follows sequence 5 is not where it ends"),
        (raise_an_id, f"token id {VOCAB_SIZE + 7}, and data.tokenizer.vocab_size is {VOCAB_SIZE}"),
        (lose_the_index, "b.idx does not exist"),
        (copy_the_validation_set, "(validation) are the same data"),
    ],
)
def test_a_broken_shard_is_named(config: RunConfig, tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(tmp_path / "b")
    for in_full in (False, True):
        [found] = [finding for finding in look(config, in_full) if finding.status == "broken"]
        assert words in found.value
        assert found.costs == "no stage starts: `inventory` refuses it"
        assert found.remedy


def test_a_sample_may_miss_what_a_full_look_finds(config: RunConfig, tmp_path: Path) -> None:
    raise_an_id(tmp_path / "b")
    [full] = data._bad_shards([data.Opened("words", Shard(tmp_path / "b"))], VOCAB_SIZE, None)
    sampled = list(data._bad_shards([data.Opened("words", Shard(tmp_path / "b"))], VOCAB_SIZE, 2))
    assert Shard(tmp_path / "b")[int(full.value.split("sequence ")[1].split()[0])].max() == VOCAB_SIZE + 7
    assert not sampled


def test_a_bad_mask_and_too_many_broken_shards(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "validation.mask").write_bytes(b"no numbers")
    config.data.pool[0].prefixes += [f"/nowhere/{index}" for index in range(15)]
    findings = look(config)
    assert "validation.mask is not a numpy file" in named(findings, "validation").value
    assert "5 more are bad" in named(findings, "shards").value


def test_a_tokenizer_that_does_not_fit(config: RunConfig, tokenizers: dict[str, Tokenizer]) -> None:
    settings = config.data.tokenizer
    settings.model = str(tokenizers["other"].path)
    found = named(look(config), "shards and tokenizer")
    assert found.status == "broken"
    assert "come back" in found.value

    settings.model = str(tokenizers["small"].path)
    assert named(look(config), "tokenizer").status == "gap"
    assert "has 300 ids, data.tokenizer.vocab_size is 360" in named(look(config), "tokenizer").value
    assert named(look(config), "shards and tokenizer").status == "broken"

    settings.model, settings.vocab_size = str(tokenizers["right"].path), 300
    findings = look(config)
    assert named(findings, "tokenizer").status == "broken"
    assert named(findings, "tokenizer").remedy == f"data.tokenizer.vocab_size={VOCAB_SIZE}"
    assert named(findings, "shard a").status == "broken"  # with ids that the settings leave out

    settings.type = "HuggingFaceTokenizer"
    assert named(look(config), "tokenizer").remedy == "data.tokenizer.type=SentencePieceTokenizer"
    settings.model = None
    assert named(look(config), "tokenizer").status == "broken"


def test_what_is_noted_beside_a_shard_is_believed(
    config: RunConfig, tmp_path: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    note = {"schema": 1, "tokenizer_digest": tokenizers["other"].digest}
    (tmp_path / "a.json").write_text(json.dumps(note))
    found = named(look(config), "shards and tokenizer")
    assert found.status == "broken"
    assert "made with another tokenizer: 1 shard, such as" in found.value


def test_documents_without_an_end_are_a_gap(
    config: RunConfig, tmp_path: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    for name in ("a", "b"):
        with ShardWriter(tmp_path / name, np.uint16) as writer:
            for ids in tokenizers["right"].encode_batch(documents(20, ord(name))):
                writer.add_document([ids])
    assert named(look(config), "end of document").status == "gap"


# --- the command


def test_the_command_on_this_machine(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, run = tmp_path / "settings.yaml", tmp_path / "run"
    assert examination.show(settings, ["target.lr_warmup_steps=10"], run, in_full=False, as_json=True)
    content = json.loads(capsys.readouterr().out)
    assert (content["schema"], content["can_run"], content["sampled"]) == (1, True, True)
    assert {finding["name"] for finding in content["findings"]} >= {"torch", "GPUs", "atomic writes", "validation"}
    assert not run.exists()

    truncate(tmp_path / "b")
    shown = megatron_bliss("doctor", settings, "--run", run, timeout=120)
    assert shown.returncode == 2
    assert "Traceback" not in shown.stderr
    assert "cannot run here: 1 broken" in shown.stdout
    assert "build the shard again" in shown.stdout


def test_settings_that_cannot_work_are_a_finding(config: RunConfig, tmp_path: Path) -> None:
    config.target.global_batch_size = 7
    found = named(examine(config, tmp_path / "run"), "settings")
    assert found.status == "broken"
    assert "target.global_batch_size is 7" in found.value


def test_overrides_without_settings_are_refused() -> None:
    with pytest.raises(UserError, match="there are none"):
        examination.show(None, ["seed=1"], None, False, False)
