"""Memory that a rank of a stage takes at its peak, from the sizes alone.

Counted are parameters, gradient buffers, float32 masters, Adam's moments, vectors in parameter space, what a
micro-batch's graph keeps, logits, and the largest passing tensors. Not counted: the CUDA context, NCCL's and cuBLAS's
buffers, fragmentation of the allocator, and the host's memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_bliss.config import ModelConfig, RunConfig
from megatron_bliss.mcore.architectures import Architecture, padded_vocab_size, resolve
from megatron_bliss.orchestration.flops import (
    attention_is_fused,
    further_products,
    num_micro_batches,
    num_validation_micro_batches,
)

GPU_CHUNK = 1 << 24  # logits that losses hold in float32 at a time (mcore/losses.py)
GPU_BLOCK = 1 << 27  # logits that the output layer of the bilevel loop makes at a time (mcore/output_layer.py)
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Peak:
    """Bytes by what they are, at the moment that the sum is largest."""

    parameters: float = 0
    gradients: float = 0
    optimizer: float = 0  # masters and moments
    vectors: float = 0  # z, averaged gradients, accumulators
    activations: float = 0  # and what passes while they are there
    logits: float = 0

    def __add__(self, other: "Peak") -> "Peak":
        return Peak(*(one + two for one, two in zip(self.amounts, other.amounts, strict=True)))

    @property
    def amounts(self) -> tuple[float, ...]:
        return (self.parameters, self.gradients, self.optimizer, self.vectors, self.activations, self.logits)

    @property
    def total(self) -> int:
        return round(sum(self.amounts))


@dataclass(frozen=True)
class _Model:
    """A model's part on one rank."""

    architecture: Architecture
    size: int  # bytes of a number in it
    vocab_size: int
    sequence_length: int
    tensor_parallel: int
    pipeline_parallel: int = 1
    shards_sequence: bool = False
    recomputes: bool = False
    is_fused: bool = True
    has_output: bool = True

    @property
    def numel(self) -> int:
        return self.architecture.num_parameters_on_rank(
            self.vocab_size, self.tensor_parallel, self.pipeline_parallel, self.has_output
        )

    def parameters(self) -> Peak:
        return Peak(parameters=self.size * self.numel)

    def trained(self, sharing: int) -> Peak:
        """Everything that stays from step to step.

        :param sharing: ranks that masters and moments are shared out over.
        """
        masters = 0 if self.size == _FLOAT else _FLOAT
        optimizer = (masters + 2 * _FLOAT) * self.numel / sharing
        return self.parameters() + Peak(gradients=_FLOAT * self.numel, optimizer=optimizer)

    def logits(self, tokens: int) -> int:
        """Numbers."""
        return tokens * padded_vocab_size(self.vocab_size) // self.tensor_parallel

    @property
    def output_numel(self) -> int:
        """Of the output layer's weight."""
        return padded_vocab_size(self.vocab_size) * self.architecture.hidden_size // self.tensor_parallel

    def graph(self, tokens: int, in_flight: int = 1) -> Peak:
        """What a backward pass finds, and the largest that passes beside it.

        :param in_flight: micro-batches whose graphs are there at a time.
        """
        architecture, hidden = self.architecture, self.architecture.hidden_size
        num_layers = -(-architecture.num_layers // self.pipeline_parallel)
        block = architecture.activations_per_token(
            self.sequence_length, self.tensor_parallel, self.shards_sequence, self.is_fused
        )
        kept = num_layers * (hidden // (self.tensor_parallel if self.shards_sequence else 1))
        numbers = tokens * (kept * in_flight + block if self.recomputes else num_layers * block * in_flight)
        if self.has_output:
            numbers += 2 * tokens * hidden  # of the last norm
        return Peak(activations=self.size * (numbers + self._passing(tokens)))

    def _passing(self, tokens: int) -> float:
        """Gradients that pass: the output layer's, or a block's, by whose time what its MLP kept is gone."""
        architecture, hidden = self.architecture, self.architecture.hidden_size
        mlp = tokens * architecture.ffn_hidden_size / self.tensor_parallel
        pairs = tokens * architecture.num_attention_heads * self.sequence_length / self.tensor_parallel
        candidates = [tokens * hidden + 2 * mlp]
        if self.has_output:
            candidates.append(self.output_numel + tokens * hidden)
        if not self.is_fused:
            candidates.append(2 * pairs - 2 * mlp)
        return max(candidates)

    def forward(self, tokens: int) -> Peak:
        """The widest place of a pass without a graph, logits left out; embeddings and a block's input stay until its
        end."""
        architecture, hidden = self.architecture, self.architecture.hidden_size
        key_values = architecture.num_query_groups * architecture.head_size
        attention = 3 * hidden + (4 * hidden + 3 * key_values) / self.tensor_parallel
        width = architecture.ffn_hidden_size * (3 if architecture.activation == "swiglu" else 2)
        mlp = 4 * hidden + width / self.tensor_parallel
        return Peak(activations=self.size * tokens * max(attention, mlp))


def stage_memory(config: RunConfig, command: str, chunk: int = GPU_CHUNK, block: int = GPU_BLOCK) -> Peak | None:
    """Of a rank of a stage, by the stage's command; None for a stage without a model.

    With `bilevel.curvature=exact` it is rough: the graph of a gradient is taken as three of a loss.

    :param chunk: logits that losses hold in float32 at a time.
    :param block: logits that the output layer of the bilevel loop makes at a time.
    """
    known: dict[str, Callable[[], Peak]] = {
        "warmup-proxy": lambda: _warmup_proxy(config),
        "warmup-target": lambda: _pretrain(config, has_reference=False),
        "pretrain": lambda: _pretrain(config, has_reference=True),
        "evaluate": lambda: _evaluate(config),
        "cache-target": lambda: _cache_target(config, chunk),
        "bilevel": lambda: _bilevel(config, chunk, block),
        "influence": lambda: _influence(config),
        "fit-influence": lambda: _fit_influence(config),
        "score": lambda: _score(config),
        "fidelity": lambda: _fidelity(config),
    }
    if command not in known or (command == "score" and config.method == "dsir"):
        return None
    return known[command]()


def _proxy(config: RunConfig, has_output: bool = True) -> _Model:
    proxy = config.proxy
    return _Model(
        resolve(proxy.model), _size(proxy.model), config.data.tokenizer.vocab_size, config.data.sequence_length,
        proxy.tensor_parallel, shards_sequence=proxy.sequence_parallel, recomputes=proxy.recompute,
        has_output=has_output,
    )  # fmt: skip


def _target(config: RunConfig) -> _Model:
    """As Megatron trains it."""
    target = config.target
    return _Model(
        resolve(target.model), _size(target.model), config.data.tokenizer.vocab_size, config.data.sequence_length,
        target.tensor_parallel, target.pipeline_parallel, target.sequence_parallel, target.recomputes,
        attention_is_fused(config),
    )  # fmt: skip


def _size(model: ModelConfig) -> int:
    return 2 if model.bf16 else _FLOAT


def _sharing(config: RunConfig) -> int:
    """Ranks that the proxy's optimizer is shared out over."""
    if not config.proxy.distributed_optimizer:
        return 1
    return max(config.launch.num_ranks // config.proxy.tensor_parallel, 1)


def _warmup_proxy(config: RunConfig) -> Peak:
    proxy, tokens = _proxy(config), config.bilevel.micro_batch_size * config.data.sequence_length
    vectors = Peak(vectors=_FLOAT * proxy.numel)
    return proxy.trained(_sharing(config)) + vectors + proxy.graph(tokens) + _loss(proxy, tokens)


def _influence(config: RunConfig) -> Peak:
    """A step on a sequence, or the reference batch after it; every rank has all of the optimizer's state, twice."""
    proxy, length = _proxy(config), config.data.sequence_length
    stays = proxy.trained(1) + Peak(vectors=3 * _FLOAT * proxy.numel)
    step = Peak(vectors=_FLOAT * proxy.numel) + proxy.graph(length) + _loss(proxy, length)
    tokens = config.bilevel.micro_batch_size * length
    judged = proxy.forward(tokens) + _loss(proxy, tokens)
    return stays + max(step, judged, key=lambda moment: moment.total)


def _fidelity(config: RunConfig) -> Peak:
    """The LLM at the beginning or the end of a backward pass, between which its graph makes room for gradients, or in a
    forward pass beside a copy of its parameters; the proxy takes less."""
    model = replace(_target(config), is_fused=True)
    tokens = config.target.micro_batch_size * config.data.sequence_length
    begins, ends = model.graph(tokens) + _loss(model, tokens), Peak(gradients=model.size * model.numel)
    displaced = model.parameters() + model.forward(tokens) + _loss(model, tokens)
    stays = model.parameters() + Peak(vectors=_FLOAT * model.numel)
    return stays + max(begins, ends, displaced, key=lambda moment: moment.total)


def _fit_influence(config: RunConfig) -> Peak:
    model, tokens = _proxy(config, has_output=False), config.bilevel.micro_batch_size * config.data.sequence_length
    return model.trained(_sharing(config)) + Peak(vectors=_FLOAT * model.numel) + model.graph(tokens)


def _loss(model: _Model, tokens: int) -> Peak:
    """Megatron's cross-entropy: the softmax in float32, beside logits in the model's own precision if that is less."""
    return Peak(logits=model.logits(tokens) * (_FLOAT if model.size == _FLOAT else _FLOAT + model.size))


def _pretrain(config: RunConfig, has_reference: bool) -> Peak:
    target, model = config.target, _target(config)
    ranks = config.launch.num_ranks // (target.tensor_parallel * target.pipeline_parallel)
    sharing = max(ranks, 1) if "--use-distributed-optimizer" in target.extra_args else 1
    state, tokens = model.trained(sharing), target.micro_batch_size * config.data.sequence_length
    tokens //= target.context_parallel
    stays = state
    if has_reference and config.online.method != "none":
        if not config.online.offload:
            stays += model.parameters()
        trains = config.online.method == "blade" or (config.online.method == "rho1" and not config.online.reference)
        if trains:  # for that time, a training of its own
            stays += state
    return stays + model.graph(tokens, in_flight=target.pipeline_parallel) + _loss(model, tokens)


def _evaluate(config: RunConfig) -> Peak:
    """The decay branch, or passes over the measured sets where there is none."""
    if config.evaluation.decay_steps:
        return _pretrain(config, has_reference=False) + _held_reference(config)
    model, tokens = _target(config), config.scoring.batch_tokens
    return model.parameters() + model.forward(tokens) + _loss(model, tokens)


def _held_reference(config: RunConfig) -> Peak:
    return Peak() if config.online.method == "none" or config.online.offload else _target(config).parameters()


def _cache_target(config: RunConfig, chunk: int) -> Peak:
    model, tokens = _target(config), config.target.micro_batch_size * config.data.sequence_length
    logits = model.size * model.logits(tokens) + 2 * _FLOAT * min(chunk, model.logits(tokens))
    return model.parameters() + model.forward(tokens) + Peak(logits=logits)


def _score(config: RunConfig) -> Peak:
    """By the score model; a method that scores by the proxy's loss has its logits on top."""
    model, tokens = _proxy(config, has_output=config.method == "perplexity"), config.scoring.batch_tokens
    if config.scoring.bf16:
        model = replace(model, size=2)
    return model.parameters() + model.forward(tokens) + (_loss(model, tokens) if model.has_output else Peak())


def _bilevel(config: RunConfig, chunk: int, block: int) -> Peak:
    """The largest of an outer step's moments, on top of what stays from step to step.

    An accumulator is there from the first gradient on: beside the graph that it is of only if that is needed again, or
    there are several micro-batches.
    """
    bilevel, sharing = config.bilevel, _sharing(config)
    proxy, score = _proxy(config), _proxy(config, has_output=False)
    tokens = bilevel.micro_batch_size * config.data.sequence_length
    stays = proxy.trained(sharing) + score.trained(sharing) + Peak(vectors=2 * _FLOAT * proxy.numel / sharing)
    numel = proxy.logits(tokens)
    block = min(block, numel)
    held, logits = _FLOAT * min(chunk, numel), Peak(logits=proxy.size * block)
    kl_logits, target_pass = logits, Peak()
    if bilevel.gamma and not bilevel.uses_cached_target:
        target = replace(_proxy(config), architecture=resolve(config.target.model), size=_size(config.target.model))
        stays += target.parameters() + Peak(activations=target.size * tokens * target.architecture.hidden_size)
        target_pass = target.forward(tokens)
        if bilevel.reuses_target(num_micro_batches(config)):
            stays += Peak(logits=target.size * numel)
        else:
            kl_logits += Peak(logits=target.size * block)
    gradient = _FLOAT * proxy.output_numel  # of the output layer's weight, on top of what a graph counts
    kl_logits += Peak(logits=4 * held, activations=gradient if proxy.size < _FLOAT else 0)
    has_many, validates_many = num_micro_batches(config) > 1, num_validation_micro_batches(config) > 1
    whole, graph = Peak(vectors=_FLOAT * proxy.numel), proxy.graph(tokens)
    beside = whole if has_many else Peak()  # an accumulator beside a graph
    tangents = logits + Peak(logits=2 * held + 2 * _FLOAT * block)
    moments = [
        score.graph(tokens) + (Peak(vectors=_FLOAT * score.numel) if has_many else Peak()),
        graph + logits + Peak(logits=2 * held) + (whole if validates_many else Peak()),
        beside + graph + Peak(activations=gradient),
        beside + target_pass,
        *_curvature(config, proxy, tokens, beside, tangents, kl_logits, target_pass),
    ]
    return stays + max(moments, key=lambda moment: moment.total)


def _curvature(
    config: RunConfig, proxy: _Model, tokens: int, beside: Peak, tangents: Peak, kl_logits: Peak, target_pass: Peak
) -> list[Peak]:
    """Moments of gradient, curvature product and g_i.

    :param beside: an accumulator that is there beside a graph. :param tangents: of a block's logits, with these.
    :param kl_logits: of a block, the target's, and what the losses hold. :param target_pass: its forward pass.
    """
    graph, curvature = proxy.graph(tokens), config.bilevel.curvature
    own, whole = Peak(vectors=_FLOAT * proxy.numel / _sharing(config)), Peak(vectors=_FLOAT * proxy.numel)
    # gradient and product of `evaluate` are there until the solver has its further products
    earlier = own + own if further_products(config) > 0 else Peak()
    if curvature == "gauss-newton":
        stays = own + own if config.bilevel.solver == "conjugate-gradient" else Peak()
        weight = Peak(activations=proxy.size * proxy.output_numel)  # of the output layer, at θ + εv
        in_float = Peak(activations=2 * _FLOAT * proxy.output_numel if proxy.size < _FLOAT else 0)
        differences = own + weight + proxy.forward(tokens)
        pulled = weight + graph + tangents
        accumulated = whole + beside + graph
        moments = [
            beside + beside + differences, beside + beside + pulled, beside + beside + own + weight + weight + in_float,
            earlier + beside + differences, earlier + beside + pulled,
            accumulated + weight, accumulated + target_pass, accumulated + kl_logits, whole + whole,
        ]  # fmt: skip
        return [stays + moment for moment in moments]
    if curvature == "finite-difference":
        between = whole + beside + own + graph + kl_logits
        return [between, earlier + between, whole + whole + own]
    if curvature == "none":
        displaced = own if proxy.size == _FLOAT else Peak()  # else the gradient is at the parameters themselves
        return [beside + displaced + graph + kl_logits, beside + displaced + target_pass, whole + displaced]
    twice = replace(proxy, is_fused=False).graph(tokens)
    return [whole + whole + Peak(logits=9 * _FLOAT * proxy.logits(tokens)) + twice + twice + twice]
