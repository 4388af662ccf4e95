"""The stand-ins for CUDA: they are complete enough for Megatron, and gone where there is a GPU."""

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_bliss.errors import UserError
from tests.distributed import run_ranks


def _names_replaced_beside_a_gpu() -> list[str]:
    import torch

    def everything() -> dict[str, Any]:
        owners = {"torch": torch, "torch.cuda": torch.cuda, "Tensor": torch.Tensor, "Module": torch.nn.Module}
        return {f"{name}.{key}": value for name, owner in owners.items() for key, value in vars(owner).items()}

    torch.cuda.is_available = lambda: True
    before = everything()
    from megatron_bliss.mcore import kernels, platform

    kernels.is_importable = lambda module: True

    platform.install()
    assert platform.environment() == {}
    assert platform.training_flags() == []
    assert platform.backend() == "nccl"
    assert "megatron.core" not in sys.modules
    after = everything()
    return [key for key in after if key in before and after[key] is not before[key]]


def test_nothing_is_replaced_where_there_is_a_gpu() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # nothing is imported in it
        assert pool.apply(_names_replaced_beside_a_gpu) == []


def _what_stands_in(rank: int) -> dict[str, Any]:
    import torch

    from megatron_bliss.mcore import platform

    platform.install()
    zeros = torch.zeros
    platform.install()
    cuda_device = torch.device("cuda", 3)
    tensors = [
        torch.zeros(2, device="cuda"),
        torch.empty(2, device=0),
        torch.tensor([1.0], device="cuda:5"),
        torch.arange(3, device=cuda_device),
        torch.ones_like(torch.ones(2), device=torch.cuda.current_device()),
        torch.ones(2).new_zeros(3, device="cuda"),
        torch.ones(2).cuda(non_blocking=True),
        torch.ones(2).to("cuda"),
        torch.ones(2).to(0, torch.float64),
        torch.ones(2).to(device=cuda_device),
        torch.nn.Linear(2, 2).cuda(1).weight,
        torch.nn.Linear(2, 2).to("cuda:1").weight,
    ]
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        torch.cuda.Event().record()
    state = torch.cuda.get_rng_state()
    draws = [torch.rand(3)]
    torch.cuda.set_rng_state(state)
    draws.append(torch.rand(3))
    return {
        "devices": {str(tensor.device) for tensor in tensors},
        "dtype_kept": torch.ones(2).to(torch.float16).dtype is torch.float16 and tensors[8].dtype is torch.float64,
        "type": torch.ones(1).type(),
        "same_draws": torch.equal(*draws),
        "idempotent": torch.zeros is zeros,
        "device": str(platform.device()),
        "backend": platform.backend(),
        "trainer": __import__("megatron.training.training").training.training.initialize_megatron.keywords,
    }


def test_gpu_requests_end_on_the_cpu() -> None:
    [found] = run_ranks(_what_stands_in, 1)
    assert found == {
        "devices": {"cpu"},
        "dtype_kept": True,
        "type": "torch.cuda.FloatTensor",
        "same_draws": True,
        "idempotent": True,
        "device": "cpu",
        "backend": "gloo",
        "trainer": {"allow_no_cuda": True},
    }


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({"transformer_engine.pytorch", "fused_weight_gradient_mlp_cuda"}, ""),
        ({"transformer_engine.pytorch"}, "--no-gradient-accumulation-fusion"),
        (
            {"apex.normalization.fused_layer_norm", "fused_weight_gradient_mlp_cuda"},
            "--transformer-impl local --no-rope-fusion --no-masked-softmax-fusion",
        ),
        (
            set(),
            "--transformer-impl local --no-rope-fusion --no-masked-softmax-fusion --no-persist-layer-norm "
            "--no-gradient-accumulation-fusion",
        ),
    ],
)
def test_flags_on_a_gpu_make_up_for_missing_packages(
    there: set[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from megatron_bliss.mcore import kernels, platform

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "is_importable", there.__contains__)
    monkeypatch.setattr(platform, "available_kernels", kernels.available_kernels.__wrapped__)
    assert platform.training_flags() == expected.split()
    assert "--transformer-impl" not in platform.training_flags(["--transformer-impl=local"])
    if "local" in expected and "persist" in expected:
        with pytest.raises(UserError, match=r"--sequence-parallel .* needs Transformer Engine or Apex"):
            platform.training_flags(["--sequence-parallel"])
    else:
        assert platform.training_flags(["--sequence-parallel"]) == expected.split()


def test_a_gpu_that_torch_cannot_use_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from megatron_bliss.mcore import platform

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(platform, "_is_installed", lambda: False)
    for name in ("_replace_cuda_module", "_replace_tensor_functions", "_replace_megatron_checks"):
        monkeypatch.setattr(platform, name, lambda: None)
    monkeypatch.setattr(platform, "environment", dict)
    monkeypatch.setattr(platform, "_NVIDIA_DEVICE", tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match="finds no GPU"):
        platform.install()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UserError, match="finds no GPU"):
        platform.install()
    for wish in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", wish)
        platform.install()
        assert capsys.readouterr().out == "no GPU found: running on the CPU with gloo\n"
    monkeypatch.setenv("RANK", "1")
    platform.install()
    assert capsys.readouterr().out == ""


def test_flags_of_the_user_win(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from megatron_bliss.mcore import platform

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    added = platform.training_flags(["--num-workers=2", "--transformer-impl", "transformer_engine"])
    assert "--num-workers" not in added
    assert "--transformer-impl" not in added
    assert added[added.index("--distributed-backend") + 1] == "gloo"
    assert platform.environment()["TORCHDYNAMO_DISABLE"] == "1"
