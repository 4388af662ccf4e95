"""One `pretrain()` with online token selection: what each of its steps, and each of its checkpoints, does more."""

import copy
import functools
import gc
import inspect
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import checkpointing, get_args, training
from torch import Tensor

from megatron_bliss.artifacts import digest_json, digest_tree
from megatron_bliss.data.seeds import derive
from megatron_bliss.data.validation import ValidationSet
from megatron_bliss.errors import UserError
from megatron_bliss.mcore import checkpoints, online_training
from megatron_bliss.mcore.checkpoint_files import find, iteration_path
from megatron_bliss.mcore.online import OnlineJob, batch_size
from megatron_bliss.mcore.online_data import Stream, ValidationSamples
from megatron_bliss.mcore.online_metrics import OnlineMetrics
from megatron_bliss.mcore.online_reference import (
    Call,
    Reference,
    as_evaluated,
    loss_mask_of,
    own_randomness,
    recorded,
)
from megatron_bliss.mcore.token_choice import choose, choose_globally

_STATE = "online"  # keys of a checkpoint
REFERENCE = "online_reference"
_INITIALIZATION = 1  # of models whose parameters are overwritten


@dataclass
class State:
    """What a checkpoint holds beside the reference's parameters."""

    method: str
    sources: dict[str, str]  # digests of the given reference and of the validation set
    num_syncs: int = 0
    synced_at: int = -1  # iteration of the last one
    position: int = 0  # reference steps done, which is where the data streams are


class OnlineSession:
    """:param arguments: of `pretrain()`, by name; the script's functions in them are replaced."""

    def __init__(self, job: OnlineJob, arguments: dict[str, Any]) -> None:
        self._job, self._config, self._method = job, job.config, job.method
        self._container, self._provider = arguments["cfg_container"], arguments.get("model_provider")
        self._model_type = arguments["model_type"]
        self._groups = arguments.get("pg_collection")
        self._forward_step = arguments["forward_step_func"]
        self._samples: Any | None = None  # the training's dataset, on ranks that read data
        self._reference: Reference | None = None
        self._state = State(job.method.name, {})
        self._metrics: OnlineMetrics | None = None
        self._is_selecting = False  # in the step that runs now
        self._ahead: deque[tuple[Any, Tensor]] = deque()  # micro-batches of the step and what they keep
        arguments["forward_step_func"] = self._wrapped_forward_step()
        arguments["train_valid_test_dataset_provider"] = self._wrapped_provider(
            arguments["train_valid_test_dataset_provider"]
        )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, Megatron's training steps and checkpoints pass through here."""
        train_step, generate = training.train_step, checkpointing.generate_state_dict
        training.train_step = self._wrapped_train_step(train_step)
        checkpointing.generate_state_dict = self._wrapped_generate(generate)
        try:
            yield
        finally:
            training.train_step, checkpointing.generate_state_dict = train_step, generate

    # What stands in for Megatron's functions and the script's

    def _wrapped_provider(self, provider: Any) -> Any:
        @functools.wraps(provider)
        def remembering(*args: Any, **kwargs: Any) -> Any:
            datasets = provider(*args, **kwargs)
            self._samples = datasets[0]
            return datasets

        return remembering

    def _wrapped_train_step(self, train_step: Any) -> Any:
        signature = inspect.signature(train_step)

        @functools.wraps(train_step)
        def stepping(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            iteration = given["iteration"]
            with ExitStack() as stack:
                self._before(iteration, given["model"], given["optimizer"])
                if self._is_selecting:
                    assert self._reference is not None
                    stack.enter_context(self._reference.use())
                result = train_step(*args, **kwargs)
            self._is_selecting = False
            if self._metrics is not None:
                self._metrics.step_done(iteration + 1)
            return result

        return stepping

    def _wrapped_generate(self, generate: Any) -> Any:
        @functools.wraps(generate)
        def generating(*args: Any, **kwargs: Any) -> Any:
            content = generate(*args, **kwargs)
            # Megatron also asks what is to be loaded: then nothing of this has begun
            if self._metrics is not None:
                content[_STATE] = {"schema": 1, **asdict(self._state)}
                if self._reference is not None and self._method.given is None:
                    content[REFERENCE] = self._reference.bare.sharded_state_dict(prefix=f"{REFERENCE}.")
            return content

        return generating

    def _wrapped_forward_step(self) -> Any:
        @functools.wraps(self._forward_step)
        def selecting(data_iterator: Any, model: Any, *more: Any) -> Any:
            if not self._is_selecting:  # evaluation too
                return self._forward_step(data_iterator, model, *more)
            kept = None
            if self._config.scope == "global-batch":
                if not self._ahead:
                    self._look_ahead(data_iterator, model)
                batch, kept = self._ahead.popleft()
                data_iterator = None if data_iterator is None else iter([batch])
            with recorded(model) as calls:
                losses, loss_func = self._forward_step(data_iterator, model, *more)
            mask = loss_mask_of(loss_func, losses, calls)
            return losses, _rebound(loss_func, mask, self._kept(losses.detach(), calls[0], mask, kept))

        return selecting

    # Choosing tokens

    def _kept(self, losses: Tensor, call: Call, mask: Tensor, kept: Tensor | None) -> Tensor:
        """The loss mask of what is kept, shaped as the given one.

        :param kept: bool [b, s], where it is known already.
        """
        assert self._reference is not None
        assert self._metrics is not None
        reference = self._reference.losses(call)
        competes = mask.view_as(losses) > 0
        if kept is None:
            kept = choose(losses - reference, competes, self._config.keep, self._config.scope)
        self._metrics.add(losses, reference, competes, kept)
        return mask * kept.view_as(mask).to(mask.dtype)

    def _look_ahead(self, data_iterator: Any, model: Any) -> None:
        """Fetch all micro-batches of the step and choose among all their tokens: one more forward pass of the model,
        and one of the reference."""
        assert self._reference is not None
        batches, excess, competes = [], [], []
        for _ in range(get_num_microbatches()):
            batch = None if data_iterator is None else next(data_iterator)
            with as_evaluated(model), recorded(model) as calls:
                # a copy, as scripts may take entries out
                only = None if data_iterator is None else iter([copy.copy(batch)])
                losses, loss_func = self._forward_step(only, model)
            mask = loss_mask_of(loss_func, losses, calls)
            batches.append(batch)
            excess.append(losses - self._reference.losses(calls[0]))
            competes.append(mask.view_as(losses) > 0)
        group = parallel_state.get_data_parallel_group()
        kept = choose_globally(excess, competes, self._config.keep, group)
        self._ahead.extend(zip(batches, kept, strict=True))

    # Between two steps

    def _before(self, iteration: int, model: list[Any], optimizer: Any) -> None:
        if self._metrics is None:
            self._begin(iteration)
        state = self._state
        if not self._job.holds and self._method.is_due(iteration, state.num_syncs) and state.synced_at != iteration:
            with _whole_parameters(model, optimizer):
                self._synchronise(iteration, model[0], optimizer)
            gc.collect()  # DDP and its parameters refer to each other: gradients would stay on the device
            state.num_syncs += 1
            state.synced_at = iteration
        self._ahead.clear()
        self._is_selecting = self._reference is not None and self._method.selects(state.num_syncs)

    def _begin(self, iteration: int) -> None:
        """Before the first step of this process: what a checkpoint has of the reference, or the given one."""
        args = get_args()
        path = self._job.metrics
        if path is None and args.save and not self._job.holds:
            path = Path(args.save) / "online" / "metrics.jsonl"
        self._metrics = OnlineMetrics(path, iteration, args.log_interval)
        self._state.sources = self._sources()
        if args.load and iteration:
            self._resume(iteration_path(Path(args.load), iteration))
        if self._method.given is not None:
            path = find(self._method.given)
            checkpoints.check_same_model(path, args)
            self._reference = self._built_reference()
            with self._reference.use():
                checkpoints.load_model(path, self._reference.bare)
            self._reference.put_aside()

    def _sources(self) -> dict[str, str]:
        sources = {}
        if self._method.given is not None:
            sources["reference"] = digest_tree(find(self._method.given))
        if self._job.trains:
            self._validation = [(weight, ValidationSet.open(prefix)) for weight, prefix in self._job.validation]
            digests = [validation.digest for _, validation in self._validation]
            weights = [repr(weight) for weight, _ in self._validation]
            sources["validation set"] = digests[0] if len(digests) == 1 else digest_json([digests, weights])
        return sources

    def _resume(self, path: Path) -> None:
        saved = checkpoints.load_common(path).get(_STATE)
        if saved is None or saved["method"] != self._method.name:
            return
        saved.pop("schema")
        state = State(**saved)
        for name, digest in self._state.sources.items():
            if state.sources.get(name) != digest:
                raise UserError(
                    f"checkpoint {path} was made with another {name} of online selection; put that one back, or start "
                    "from a checkpoint without it"
                )
        self._state = state
        if state.num_syncs and self._method.given is None:
            self._reference = self._built_reference()
            with self._reference.use():
                checkpoints.load_model(path, self._reference.bare, REFERENCE)
            self._reference.put_aside()

    def _build(self) -> Any:
        """A model like the one in training, without DDP."""
        model_config = getattr(self._container, "model", None)
        groups = self._groups or ProcessGroupCollection.use_mpu_process_groups()
        with own_randomness(_INITIALIZATION):
            if model_config is None:
                built = training.get_model(self._provider, self._model_type, wrap_with_ddp=False, pg_collection=groups)
            else:
                builder = model_config.get_builder_cls()(model_config)
                built = builder.build_distributed_models(pg_collection=groups, wrap_with_ddp=False)
        [module] = built
        return module

    def _built_reference(self) -> Reference:
        return Reference(self._build(), self._config.offload)

    def _synchronise(self, iteration: int, model: Any, optimizer: Any) -> None:
        """w ← u; then, where it is trained, the reference steps. The outgoing reference stays until the new one is
        whole."""
        began, figures = time.monotonic(), torch.empty(0)
        parameters = list(training.unwrap_model(model).parameters())
        if self._method.upkeep == "average":
            if self._reference is None:
                self._reference = self._built_reference()
                self._reference.set(parameters)
            else:
                self._reference.average(parameters, self._config.average)
        else:
            parameters, figures = self._trained(model, optimizer)
            if self._reference is None:
                self._reference = self._built_reference()
            self._reference.set(parameters)
        assert self._metrics is not None
        self._metrics.synchronised(iteration, self._state.num_syncs + 1, figures, time.monotonic() - began)

    def _trained(self, model: Any, optimizer: Any) -> tuple[list[Tensor], Tensor]:
        """:returns: parameters of the new reference; its losses at the first and the last step, [2, 2], or of the
        validation set alone, [2, 1]."""
        args, config, state = get_args(), self._config, self._state
        lambda_ = config.lambda_ if self._method.upkeep == "train" else 0.0
        dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        seed = derive(args.seed, "online")

        def stream(name: str, samples: Any) -> Stream:
            size = batch_size(self._job, args)
            return Stream(samples, derive(seed, name), args.micro_batch_size, size, dp_rank, dp_size)

        reads = self._samples is not None
        validation = ValidationSamples(
            self._validation, args.seq_length, args.create_attention_mask_in_dataloader, derive(seed, "validation")
        )
        selects = self._reference is not None and self._method.selects(state.num_syncs)
        objective = online_training.Objective(
            self._forward_step,
            stream("validation", validation if reads else None),
            stream("training", self._samples),
            lambda_,
            self._alpha if selects else None,
        )
        trainee = online_training.Trainee(self._build(), model, optimizer, args)
        with ExitStack() as stack:
            stack.enter_context(own_randomness(derive(seed, "dropout", state.position) % 2**31))
            if self._reference is not None:
                stack.enter_context(self._reference.use())
            figures = online_training.train(
                trainee, objective, model, state.position, config.reference_steps, dist.get_rank() == 0
            )
        state.position += config.reference_steps
        return list(training.unwrap_model(trainee.model).parameters()), figures if lambda_ else figures[:, :1]

    def _alpha(self, losses: Tensor, call: Call, mask: Tensor) -> Tensor:
        assert self._reference is not None
        competes = mask > 0
        # a reference step has no batch but its micro-batches; where the step's tokens compete globally, these do
        scope = "sequence" if self._config.scope == "sequence" else "micro-batch"
        kept = choose(losses - self._reference.losses(call), competes, self._config.keep, scope)
        return mask * kept.to(mask.dtype)


def _rebound(loss_func: Any, mask: Tensor, kept: Tensor) -> Any:
    """The script's loss function with another mask in the place of the one it was bound with."""

    def swap(value: Any) -> Any:
        return kept if value is mask else value

    keywords = {name: swap(value) for name, value in loss_func.keywords.items()}
    return functools.partial(loss_func.func, *map(swap, loss_func.args), **keywords)


@contextmanager
def _whole_parameters(model: list[Any], optimizer: Any) -> Iterator[None]:
    """Inside, every rank has all parameters of the last step, also with --overlap-param-gather."""
    overlaps = bool(getattr(model[0], "remove_forward_pre_hook_handles", None))
    if overlaps:
        training.disable_forward_pre_hook(model, optimizer)
    try:
        yield
    finally:
        if overlaps:
            training.enable_forward_pre_hook(model)
