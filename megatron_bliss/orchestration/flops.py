"""Floating-point operations of the passes that a stage makes through its models; a backward pass is twice a forward
pass, and recomputed activations are one more."""

from dataclasses import dataclass, replace
from itertools import pairwise

from megatron_bliss.config import BilevelConfig, RunConfig
from megatron_bliss.mcore.architectures import resolve


@dataclass(frozen=True)
class Passes:
    """Passes through a model, for the whole batch."""

    forward: float = 0
    backward: float = 0

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> "Passes":
        return Passes(self.forward * times, self.backward * times)


FORWARD, TRAINING = Passes(1, 0), Passes(1, 1)
# A curvature product alone, and with gradient and g_i (`Curvature.evaluate`). Through a second backward pass go as many
# as through forward, backward and backward through the two.
_PRODUCT = {
    "none": Passes(), "finite-difference": Passes(2, 2), "gauss-newton": Passes(3, 1), "exact": Passes(3, 3),
}  # fmt: skip
_EVALUATION = {
    "none": Passes(2, 1), "finite-difference": Passes(2, 2), "gauss-newton": Passes(3, 2), "exact": Passes(6, 4),
}  # fmt: skip
# passes on top of those where parameters have 16 bits: their gradient is not taken at a displaced point
_EVALUATION_IN_16_BITS = {"none": FORWARD, "finite-difference": TRAINING}


def proxy_flops(config: RunConfig, passes: Passes, has_output: bool = True) -> float:
    """A token of a proxy or, without an output layer, of a score model."""
    architecture = resolve(config.proxy.model)
    blocks = architecture.block_flops_per_token(config.data.sequence_length)
    output = architecture.output_flops_per_token(config.data.tokenizer.vocab_size) if has_output else 0
    again = passes.backward * blocks if config.proxy.recompute else 0.0
    return (passes.forward + 2 * passes.backward) * (blocks + output) + again


def target_flops(config: RunConfig, passes: Passes) -> float:
    """A token of the LLM where it is not trained."""
    architecture, data = resolve(config.target.model), config.data
    blocks = architecture.block_flops_per_token(data.sequence_length)
    output = architecture.output_flops_per_token(data.tokenizer.vocab_size)
    again = passes.backward * blocks if config.target.recomputes else 0.0
    return (passes.forward + 2 * passes.backward) * (blocks + output) + again


def target_training_flops(config: RunConfig) -> float:
    """A token of the LLM's training, by Megatron's layers."""
    architecture, data = resolve(config.target.model), config.data
    blocks = architecture.block_flops_per_token(data.sequence_length, attention_is_fused(config))
    output = architecture.output_flops_per_token(data.tokenizer.vocab_size)
    return (4 if config.target.recomputes else 3) * blocks + 3 * output


def attention_is_fused(config: RunConfig) -> bool:
    """Whether the LLM's attention is one kernel: always, unless its flags ask for Megatron's local layers."""
    words = config.target.extra_args
    return ("--transformer-impl", "local") not in pairwise(words)


def bilevel_flops_per_step(config: RunConfig) -> float:
    """Of one outer step: a mean over those that update z and those that do not, which have no curvature product and no
    validation batch."""
    idle = replace(config, bilevel=replace(config.bilevel, curvature="none", validation_batch_size=0))
    share = solving_steps(config.bilevel) / config.bilevel.outer_steps
    return share * _flops_of_step(config) + (1 - share) * _flops_of_step(idle)


def solving_steps(bilevel: BilevelConfig) -> int:
    """Outer steps of a round that update z."""
    first = min(bilevel.solve_first, bilevel.outer_steps)
    return first + sum(step % bilevel.solve_interval == 0 for step in range(first, bilevel.outer_steps))


def _flops_of_step(config: RunConfig) -> float:
    """Of inner steps, curvature products, g_i, validation gradient, target and score model."""
    bilevel, length = config.bilevel, config.data.sequence_length
    if bilevel.solver == "paper":
        passes = TRAINING * bilevel.inner_steps + _PRODUCT[bilevel.curvature] * bilevel.z_steps + Passes(2, 0)
    else:
        passes = TRAINING * (bilevel.inner_steps - 1) + _EVALUATION[bilevel.curvature]
        passes += _PRODUCT[bilevel.curvature] * further_products(config)
        if config.proxy.model.bf16:
            passes += _EVALUATION_IN_16_BITS.get(bilevel.curvature, Passes())
    a_token = (
        proxy_flops(config, passes)
        + proxy_flops(config, Passes(2, 1), has_output=False)  # weights, then the score model's own step
        + target_flops(config, FORWARD * _target_passes(config))
    )
    if bilevel.curvature == "gauss-newton" and bilevel.solver != "paper":  # the logits of ∇G are made once more
        a_token += resolve(config.proxy.model).output_flops_per_token(config.data.tokenizer.vocab_size)
    pool = bilevel.batch_size * length * a_token
    return pool + validation_batch(config) * length * proxy_flops(config, TRAINING)


def validation_batch(config: RunConfig) -> int:
    """Sequences of all validation sets in an outer step."""
    return config.bilevel.validation_batch_size * len(config.data.validation_prefixes)


def _target_passes(config: RunConfig) -> int:
    """Forward passes of the target over the batch in an outer step: one for each way through its micro-batches."""
    bilevel = config.bilevel
    if bilevel.gamma == 0 or bilevel.uses_cached_target:
        return 0
    if num_micro_batches(config) == 1:
        return 1  # its logits are kept
    needs_target = 1 if bilevel.curvature in ("finite-difference", "exact") else 0  # for a product alone
    if bilevel.solver == "paper":
        return bilevel.inner_steps + needs_target * bilevel.z_steps
    has_two = bilevel.curvature == "finite-difference" and config.proxy.model.bf16
    evaluation = 2 if bilevel.curvature == "exact" or has_two else 1
    return bilevel.inner_steps - 1 + evaluation + needs_target * further_products(config)


def further_products(config: RunConfig) -> int:
    """Products of an outer step beside the one that comes with the gradient and g_i."""
    return config.bilevel.z_steps - (0 if config.bilevel.solver == "conjugate-gradient" else 1)


def num_micro_batches(config: RunConfig) -> int:
    """Of a batch of the pool, on each rank."""
    return _micro_batches(config, config.bilevel.batch_size)


def num_validation_micro_batches(config: RunConfig) -> int:
    """Of all validation sets in an outer step, on each rank."""
    return _micro_batches(config, validation_batch(config))


def _micro_batches(config: RunConfig, num_sequences: int) -> int:
    ranks = max(config.launch.num_ranks // config.proxy.tensor_parallel, 1)
    return -(-num_sequences // (config.bilevel.micro_batch_size * ranks))
