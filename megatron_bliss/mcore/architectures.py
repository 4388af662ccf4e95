"""Architectures by name: the one place that says how large a model is and what its blocks are made of.

`megatron_flags()` describes a model to Megatron's `pretrain()`, `transformer_config_kwargs()` and `gpt_model_kwargs()`
describe the same model to Megatron-Core's classes; both are derived from the same numbers, so a checkpoint of the one
loads into the other. Nothing here imports Megatron, and sizes can be worked out on any machine.

The Pythia presets keep the sizes, rotary share, biases and untied embeddings of the originals. Pythia computes
attention and MLP side by side from the same input; Megatron's `GPTModel` has the usual sequential pre-norm block,
and that is what is built.
"""

from dataclasses import dataclass, replace
from typing import Any

from megatron_bliss.config import ModelConfig
from megatron_bliss.errors import UserError

# Megatron's own --make-vocab-size-divisible-by. The padding does not depend on the tensor-parallel size here, so that
# models of any layout have logits of one width and checkpoints of one shape.
VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer with rotary positions, no dropout and untied embeddings."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int  # key-value heads; equal to num_attention_heads for full multi-head attention
    normalization: str = "LayerNorm"  # LayerNorm | RMSNorm
    activation: str = "gelu"  # gelu | swiglu
    bias: bool = True  # of every linear layer but the output layer
    rotary_percent: float = 0.25  # share of each head's dimensions that is rotated
    rotary_base: int = 10_000
    max_sequence_length: int = 2048  # tokens
    norm_epsilon: float = 1e-5
    init_std: float = 0.02

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def num_parameters(self, vocab_size: int) -> int:
        """:param vocab_size: of the tokenizer, before padding."""
        embeddings = 2 * padded_vocab_size(vocab_size) * self.hidden_size
        return embeddings + self.num_layers * (self._block_weights + self._block_vectors) + self._norm

    def num_parameters_on_rank(
        self, vocab_size: int, tensor_parallel: int = 1, pipeline_parallel: int = 1, has_output: bool = True
    ) -> int:
        """Of the rank that holds the most: matrices and biases of column-parallel layers are shared out, norms and
        other biases are copies.

        :param has_output: False: without an output layer, as the score model.
        """
        num_layers = -(-self.num_layers // pipeline_parallel)
        copies = 2 * self._norm + (2 * self.hidden_size if self.bias else 0)
        block = (self._block_weights + self._block_vectors - copies) // tensor_parallel + copies
        num_tables = 2 if pipeline_parallel == 1 and has_output else 1  # the first stage has one, the last the other
        tables = num_tables * padded_vocab_size(vocab_size) * self.hidden_size // tensor_parallel
        return num_layers * block + tables + self._norm

    def flops_per_token(self, sequence_length: int, vocab_size: int) -> int:
        """Floating-point operations of training on one token: a forward pass and a backward pass of twice its cost.

        A multiply-add counts as two; causal attention looks back half a sequence on average. A forward pass alone is
        a third of this.
        """
        return 3 * (self.block_flops_per_token(sequence_length) + self.output_flops_per_token(vocab_size))

    def block_flops_per_token(self, sequence_length: int, is_causal: bool = True) -> int:
        """Of a forward pass through all blocks.

        :param is_causal: False: attention writes out the scores of all pairs, those it masks too.
        """
        attention = (2 if is_causal else 4) * self.num_layers * self.hidden_size * sequence_length
        return 2 * self.num_layers * self._block_weights + attention

    def output_flops_per_token(self, vocab_size: int) -> int:
        """Of a forward pass of the output layer."""
        return 2 * padded_vocab_size(vocab_size) * self.hidden_size

    def activations_per_token(
        self, sequence_length: int, tensor_parallel: int, shards_sequence: bool, is_fused: bool
    ) -> int:
        """Numbers that one block keeps of a token for its backward pass, on each rank.

        Inputs and outputs of both norms; queries, keys and values as projected and as rotated; attention's output, as
        it comes and as the projection takes it; input and output of the activation.

        :param shards_sequence: sequence parallelism: the norms' part is shared out as well.
        :param is_fused: False: attention keeps the probabilities of all pairs.
        """
        hidden, key_values = self.hidden_size, self.num_query_groups * self.head_size
        attention = 2 * hidden + 3 * key_values
        attention += 2 * hidden if is_fused else hidden + self.num_attention_heads * sequence_length
        mlp = self.ffn_hidden_size * (4 if self.activation == "swiglu" else 2)
        norms = 4 * hidden // (tensor_parallel if shards_sequence else 1)
        return norms + (attention + mlp) // tensor_parallel

    def megatron_flags(self) -> list[str]:
        """The architecture as flags of Megatron's training script, vocabulary and sequence length left out."""
        flags = {
            "--num-layers": self.num_layers,
            "--hidden-size": self.hidden_size,
            "--ffn-hidden-size": self.ffn_hidden_size,
            "--num-attention-heads": self.num_attention_heads,
            "--max-position-embeddings": self.max_sequence_length,
            "--position-embedding-type": "rope",
            "--rotary-percent": self.rotary_percent,
            "--rotary-base": self.rotary_base,
            "--normalization": self.normalization,
            "--norm-epsilon": self.norm_epsilon,
            "--init-method-std": self.init_std,
            "--attention-dropout": 0.0,
            "--hidden-dropout": 0.0,
        }
        words = [str(word) for pair in flags.items() for word in pair]
        words.append("--untie-embeddings-and-output-weights")
        if self.num_query_groups != self.num_attention_heads:
            words += ["--group-query-attention", "--num-query-groups", str(self.num_query_groups)]
        if self.activation == "swiglu":
            words.append("--swiglu")
        if not self.bias:
            words.append("--disable-bias-linear")
        return words

    def transformer_config_kwargs(self) -> dict[str, Any]:
        """The same as keyword arguments of `megatron.core.transformer.TransformerConfig`."""
        kwargs: dict[str, Any] = {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.num_query_groups,
            "normalization": self.normalization,
            "layernorm_epsilon": self.norm_epsilon,
            "init_method_std": self.init_std,
            "add_bias_linear": self.bias,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        }
        if self.activation == "swiglu":
            from torch.nn.functional import silu

            kwargs |= {"gated_linear_unit": True, "activation_func": silu}
        return kwargs

    def gpt_model_kwargs(self, vocab_size: int) -> dict[str, Any]:
        """What `megatron.core.models.gpt.GPTModel` takes beside the transformer configuration and the layer spec.

        :param vocab_size: of the tokenizer, before padding.
        """
        return {
            "vocab_size": padded_vocab_size(vocab_size),
            "max_sequence_length": self.max_sequence_length,
            "position_embedding_type": "rope",
            "rotary_percent": self.rotary_percent,
            "rotary_base": self.rotary_base,
            "share_embeddings_and_output_weights": False,
        }

    @property
    def _block_weights(self) -> int:
        queries_and_output = 2 * self.hidden_size * self.hidden_size
        keys_and_values = 2 * self.hidden_size * self.num_query_groups * self.head_size
        mlp_matrices = 3 if self.activation == "swiglu" else 2
        return queries_and_output + keys_and_values + mlp_matrices * self.hidden_size * self.ffn_hidden_size

    @property
    def _block_vectors(self) -> int:
        if not self.bias:
            return 2 * self._norm
        attention = self.hidden_size + 2 * self.num_query_groups * self.head_size + self.hidden_size
        up = self.ffn_hidden_size * (2 if self.activation == "swiglu" else 1)
        return 2 * self._norm + attention + up + self.hidden_size

    @property
    def _norm(self) -> int:
        return self.hidden_size * (2 if self.normalization == "LayerNorm" else 1)


def _pythia(num_layers: int, hidden_size: int, num_heads: int) -> Architecture:
    return Architecture(num_layers, hidden_size, 4 * hidden_size, num_heads, num_heads)


PRESETS: dict[str, Architecture] = {
    "tiny": _pythia(2, 64, 2),
    "small": _pythia(4, 128, 4),
    "pythia-31m": _pythia(6, 256, 8),
    "pythia-70m": _pythia(6, 512, 8),
    "pythia-160m": _pythia(12, 768, 12),
    "pythia-410m": _pythia(24, 1024, 16),
    "pythia-1b": _pythia(16, 2048, 8),
    "pythia-2.8b": _pythia(32, 2560, 32),
    "llama-0.5b": Architecture(
        22, 1280, 3456, 20, 20, normalization="RMSNorm", activation="swiglu", bias=False, rotary_percent=1.0
    ),
}


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding and width of the logits."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def resolve(config: ModelConfig) -> Architecture:
    """The preset with the user's numbers in place of its own. Without a feed-forward size of its own, a changed
    hidden size keeps the preset's ratio of the two.

    :raises UserError: for an unknown preset, or sizes that do not fit together.
    """
    if config.preset not in PRESETS:
        raise UserError(f"model preset {config.preset!r} is not known; it must be one of {', '.join(PRESETS)}")
    preset = PRESETS[config.preset]
    hidden = config.hidden_size or preset.hidden_size
    heads = config.num_attention_heads or preset.num_attention_heads
    grouped = preset.num_query_groups != preset.num_attention_heads
    architecture = replace(
        preset,
        num_layers=config.num_layers or preset.num_layers,
        hidden_size=hidden,
        ffn_hidden_size=config.ffn_hidden_size or preset.ffn_hidden_size * hidden // preset.hidden_size,
        num_attention_heads=heads,
        num_query_groups=preset.num_query_groups if grouped else heads,
    )
    if hidden % heads:
        raise UserError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}; choose one that is")
    return architecture
