"""What a step of BLADE costs beside a plain step, and what of its reference is on the device between steps.

In one process, Megatron's own trainer on a small model, a plain step after each step with BLADE: `overhead_ratio` is
the mean step of a sync interval of T steps over the plain step + the reference's forward passes of a step + K/T
reference steps, each the median of its own timings in that interval; median and range of the intervals. What else an
interval has is overhead: building and copying models, the fresh optimizer, sorting, metrics.

Memory is counted as the storages of all live tensors between two steps, above those before the first synchronisation
and over the parameters' bytes: after all synchronisations, of which each leaves a rotary embedding in Megatron's cache
(of 32 entries). What is put aside is the host's, also where the device is a CPU.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_bliss.config import ModelConfig, OnlineConfig
from megatron_bliss.mcore.architectures import resolve
from megatron_bliss.mcore.online import OnlineJob, install
from megatron_bliss.mcore.script import PACKAGED_SCRIPT, run_script
from megatron_bliss.methods import online_method
from tests.tiny_run import write_chain_shard

VOCAB_SIZE, LENGTH, MICRO_BATCH, BATCH = 256, 128, 4, 8
INTERVAL, REFERENCE_STEPS = 20, 6  # T and K, in the ratio of the defaults
INTERVALS = {False: 7, True: 4}  # offloaded? Of the first, five are timed: one selects nothing, one warms up
SETTINGS = f"--seq-length {LENGTH} --micro-batch-size {MICRO_BATCH} --global-batch-size {BATCH} --lr 1e-3 --seed 3"
DATA = f"--tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} --padded-vocab-size {VOCAB_SIZE} --split 100,0,0"
LOOP = "--lr-decay-style constant --eval-iters 0 --eval-interval 10000 --log-interval 10"


def arguments(folder: Path, intervals: int) -> list[str]:
    model = ModelConfig(preset="tiny", hidden_size=128, ffn_hidden_size=512)
    words = [*resolve(model).megatron_flags(), *SETTINGS.split(), *DATA.split(), *LOOP.split()]
    words += ["--train-samples", str(2 * BATCH * INTERVAL * intervals), "--no-create-attention-mask-in-dataloader"]
    return [*words, "--data-path", str(folder / "walk"), "--data-cache-path", str(folder / "cache")]


class Clock:
    """Times what it wraps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds.setdefault(name, []).append(time.perf_counter() - began)
            return result

        return timing

    def take(self) -> dict[str, list[float]]:
        taken, self.seconds = self.seconds, {}
        return taken


def live_bytes() -> int:
    """Of the storages of all tensors that Python knows."""
    import torch

    gc.collect()
    tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def worker(folder: Path, offload: bool) -> None:
    """Train, and write folder/result.json."""
    config = OnlineConfig("blade", sync_interval=INTERVAL, reference_steps=REFERENCE_STEPS, offload=offload)
    method = online_method(config)
    assert method is not None
    job, result = (
        OnlineJob(config, method, [(1.0, str(folder / "valid"))], folder / "metrics.jsonl"),
        folder / "result.json",
    )

    def before() -> None:
        from megatron.training import training

        from megatron_bliss.mcore.online_reference import Reference
        from megatron_bliss.mcore.online_session import OnlineSession
        from megatron_bliss.mcore.online_training import Trainee

        install(job)
        clock, plain_step, intervals, live = Clock(), training.train_step, [], []
        Trainee.step = clock.timed("reference_step", Trainee.step)  # type: ignore[method-assign]
        forward = Reference.losses
        wrap = OnlineSession._wrapped_train_step

        def wrapped(session: Any, train_step: Any) -> Any:
            blade, plain = clock.timed("blade", wrap(session, train_step)), clock.timed("plain", plain_step)
            calls: list[Any] = []

            def losses(reference: Any, call: Any) -> Any:
                calls.append(call)
                return forward(reference, call)

            Reference.losses = losses  # type: ignore[method-assign]

            def stepping(*args: Any, **kwargs: Any) -> Any:
                done = kwargs["iteration"]
                if done and done % INTERVAL == 0:
                    reference = session._reference
                    aside = 0
                    if reference is not None and not reference.is_on_device:
                        aside = sum(host.untyped_storage().nbytes() for host in reference._host)
                    live.append(live_bytes() - aside)
                    if reference is not None:
                        size = sum(parameter.numel() * 4 for parameter in reference.bare.parameters())
                        intervals.append(clock.take())
                        content = {"intervals": intervals, "live": live, "parameters": size}
                        result.write_text(json.dumps(content))
                    else:
                        clock.take()
                    if done == INTERVAL * INTERVALS[offload]:  # half of the data: the plain steps have taken the other
                        raise SystemExit(0)
                returned = blade(*args, **kwargs)
                if session._reference is not None:
                    with session._reference.use():
                        last = calls[-BATCH // MICRO_BATCH :]
                        clock.timed("forward", lambda: [forward(session._reference, call) for call in last])()
                calls.clear()
                plain(*args, **kwargs)
                return returned

            return stepping

        OnlineSession._wrapped_train_step = wrapped  # type: ignore[method-assign]

    run_script(PACKAGED_SCRIPT, arguments(folder, INTERVALS[offload]), None, before)


def trained(folder: Path, offload: bool) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.benchmarks.bench_online", str(folder), str(int(offload))]
    with open(folder / "log", "w") as stream:
        subprocess.run(command, check=True, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    content: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return content


def ratio(interval: dict[str, list[float]]) -> float:
    cost = {name: statistics.median(seconds) for name, seconds in interval.items()}
    share = REFERENCE_STEPS / INTERVAL
    return statistics.mean(interval["blade"]) / (cost["plain"] + cost["forward"] + share * cost["reference_step"])


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, shard in enumerate(("walk", "valid")):
            write_chain_shard(folder / shard, 2000, seed, noise=0.3)
        resident, offloaded = trained(folder, False), trained(folder, True)
    intervals = resident["intervals"][1:]
    ratios = [ratio(interval) for interval in intervals]
    medians = {
        f"{part}_s": statistics.median(seconds for interval in intervals for seconds in interval[part])
        for part in ("blade", "plain", "forward", "reference_step")
    }
    over_plain = [statistics.mean(each["blade"]) / statistics.median(each["plain"]) for each in intervals]
    return {
        "overhead_ratio": statistics.median(ratios),
        "spread": [round(min(ratios), 4), round(max(ratios), 4)],
        "over_plain_step": statistics.median(over_plain),
        **medians,
        "device_memory_over_parameters": {
            kind: (found["live"][-1] - found["live"][0]) / found["parameters"]
            for kind, found in (("resident", resident), ("offloaded", offloaded))
        },
    }


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2] == "1")
