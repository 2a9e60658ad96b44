"""What a model is: one typed part for every slot. Rules between parts live in `resolve.py`.

A slot that can be empty has a `kind` whose value `"none"` is the identity; nothing is switched by a missing key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, PositiveFloat, Tag

from andromeda.config.base import BaseConfig, StringTuple

BACKENDS = ("auto", "eager", "sdpa", "flash", "cudnn", "flex", "fa4")
"""Attention backends that `attention.backend` may name; `auto` takes the fastest that can compute the pattern."""

MIXERS = {
    "softmax": "andromeda.model.attention:Attention",
    "sigmoid": "andromeda.model.sigmoid_attention:SigmoidAttention",
}
"""Token mixers that `attention.mixer` or `mixers.NAME.kind` may name, each by its `package.module:Class`."""
FULL = ("full", "attention")
"""Names in `model.layers` of the mixer that `[model.attention]` describes."""

QK_NORMS = ("none", "l2", "l2_head_scale", "l2_dim_scale", "rms", "rms_dim_scale")
VALUE_EMBEDDINGS = ("none", "layered")

MAX_SIZE, MAX_LENGTH = 1_000_000, 2_000_000_000
MAX_LAYERS, MAX_SHARED_EXPERTS = 1_024, 8
"""Where a number is surely a slip: beyond any model's sizes, and beyond what token ids and positions of 32 bits can count."""
Size = Annotated[int, Field(gt=0, le=MAX_SIZE)]
Length = Annotated[int, Field(gt=0, le=MAX_LENGTH)]


class PartConfig(BaseConfig):
    """A tagged table: `kind` names a part, all other keys belong to that part and are checked by its class's own `Config`."""

    model_config = ConfigDict(extra="allow")

    kind: str
    """A registered name, or `package.module:Class` of a user's own."""

    @property
    def own(self) -> dict[str, Any]:
        """The keys that belong to the part."""
        return dict(self.model_extra or {})


NAME, TABLE = "<name>", "<table>"
PartName = Annotated[
    Annotated[str, Tag(NAME)] | Annotated[PartConfig, Tag(TABLE)],
    Discriminator(lambda value: TABLE if isinstance(value, Mapping | PartConfig) else NAME),
]
"""A part by its name alone, or by a table with the name as `kind` and keys of its own."""


class EmbeddingConfig(BaseConfig):
    """How token ids become vectors, and whether the head shares that table."""

    kind: Literal["plain", "factorized", "custom"] = "plain"
    """A table of vocabulary x hidden size, a low-rank factorization of it, or a user's own class."""
    rank: Size = 128
    """Inner width of a factorized table."""
    provider: str = ""
    """`package.module:Class` of a user's own embedding (kind custom)."""
    absolute: bool = False
    """Add a learned vector for each absolute position."""
    norm: bool = False
    """RMS-normalize the embedded tokens, as the speedrun's model does."""


class RopeScalingConfig(BaseConfig):
    """Frequency scaling that extends rotary positions to a longer context."""

    kind: Literal["none", "linear", "ntk", "dynamic", "yarn", "llama3"] = "none"
    """Linear (position interpolation), NTK-aware, NTK that follows the length, YaRN, or Llama 3's: YaRN's ramp over rotations alone."""
    factor: float = Field(1.0, ge=1.0)
    """New context length over the original one."""
    original_max_seq_len: int = Field(0, ge=0, le=MAX_LENGTH)
    """Context the model was trained at; 0 means `context / factor`."""
    beta_fast: PositiveFloat = 32.0
    """YaRN and llama3: pairs that turn at least this often over the original context keep their frequency (high_freq_factor)."""
    beta_slow: PositiveFloat = 1.0
    """YaRN and llama3: pairs that turn at most this often are slowed down by the whole factor (low_freq_factor)."""
    ramp: Literal["index", "rotations"] = "index"
    """YaRN's ramp: over the dimension's index, as the released code and transformers do, or over its rotations, as the paper writes."""


class RotaryConfig(BaseConfig):
    """Rotary positions, with or without xPos's decay (arXiv 2104.09864, 2212.10554)."""

    kind: Literal["none", "rope", "xpos"] = "xpos"
    """RoPE turns pairs of dimensions with the position; xPos also lets them decay with the distance."""
    theta: PositiveFloat = 10000.0
    """Base of the frequencies theta^(-2i/D)."""
    fraction: float = Field(1.0, gt=0.0, le=1.0)
    """Share of each head's dimensions that are rotated, as in GPT-NeoX; rotary_emb_fraction and partial_rotary_factor are this share."""
    head_fraction: float = Field(1.0, gt=0.0, le=1.0)
    """Share of the heads that are rotated: the last ones, each key/value head with the query heads that read it."""
    layout: Literal["half", "interleaved"] = "half"
    """Pairs are (i, i + D/2) or (2i, 2i + 1)."""
    scale_base: Length = 512
    """xPos: distance, in tokens, at which the decay is zeta to the first power."""
    heads: Literal["all", "non_alibi"] = "all"
    """Turn every head, or only those without ALiBi, so that each head has one kind of position."""
    scaling: RopeScalingConfig = RopeScalingConfig()


class AlibiConfig(BaseConfig):
    """Linear biases on the first `num_heads` heads (arXiv 2108.12409); 0 heads is off."""

    num_heads: int = Field(0, ge=0)
    """How many heads, counted from the first, have a bias; the others see all distances alike."""
    fold_into_qk: bool = False
    """Carry the bias in four reserved dimensions of each head, so that any causal kernel computes it."""
    scale: PositiveFloat = 1.0
    """Divides every slope: the rule by which ALiBi is extended to a longer context."""


class AttentionConfig(BaseConfig):
    """Heads, their normalization, their reach, and the kernel that computes them."""

    mixer: str = "softmax"
    """A registered token mixer, or `package.module:Class` of a user's own."""
    num_heads: Size = 24
    """Query heads."""
    num_kv_heads: Size = 1
    """Key/value heads: 1 is multi-query, as many as `heads` is multi-head, any divisor between is grouped."""
    head_dim: Size = 128
    """Dimensions of a head; width need not be heads x head_dim."""
    bias: bool = False
    """Biases in the query, key, value and output projections."""
    qk_norm: PartName = "none"
    """Queries and keys of unit length (l2), with a learned scale per head or per dimension (l2_head_scale, l2_dim_scale), of unit root
    mean square (rms), with a learned scale per dimension that all heads share (rms_dim_scale); or `package.module:Class` of a user's own,
    alone or as the `kind` of a table with keys of its own."""
    scale: float = Field(0.0, ge=0.0)
    """Softmax scale; 0 takes the QK norm's own (10 for l2, 1/sqrt(D) otherwise)."""
    softcap: float = Field(0.0, ge=0.0)
    """Attention logits become cap * tanh(logits / cap); 0 is off."""
    sliding_window: int = Field(0, ge=0, le=MAX_LENGTH)
    """Tokens that a query sees, itself included; 0 is all."""
    full_attention_interval: int = Field(0, ge=0)
    """With a window: every n-th layer sees everything; 0 is none."""
    backend: str = "auto"
    """Kernel that computes attention: auto, eager, sdpa, flash, cudnn, flex or fa4."""


class AttentionOverrides(BaseConfig):
    """Keys of `[model.mixers.NAME]` for a registered kind; those left out are as in `[model.attention]`."""

    bias: bool | None = None
    """As in model.attention."""
    qk_norm: PartName | None = None
    """As in model.attention."""
    scale: float | None = Field(None, ge=0.0)
    """As in model.attention."""
    softcap: float | None = Field(None, ge=0.0)
    """As in model.attention."""
    sliding_window: int | None = Field(None, ge=0, le=MAX_LENGTH)
    """As in model.attention; it holds for every layer that has this mixer."""
    backend: str | None = None
    """As in model.attention."""


class FeedForwardConfig(BaseConfig):
    """The position-wise network."""

    kind: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu", "geglu_tanh", "reglu", "moe"] = "gelu"
    """Activation of a two-matrix network, gate of a three-matrix one (swiglu, geglu, geglu_tanh, reglu), or a mixture of experts."""
    intermediate_size: int = Field(0, ge=0, le=MAX_SIZE)
    """Inner width; 0 takes `mult` times the model's width (for gated kinds two thirds of that, to 64)."""
    mlp_ratio: PositiveFloat = 4.0
    """Inner width over the model's width, when `hidden` is 0."""
    bias: bool = False
    """Biases in both projections."""


class ExpertsConfig(BaseConfig):
    """Mixture of experts (feedforward.kind moe): dropless top-k routing."""

    num_experts: Size = 8
    """Experts of a layer."""
    top_k: Size = 2
    """Experts that each token goes through, besides the shared ones."""
    num_shared_experts: int = Field(0, ge=0, le=MAX_SHARED_EXPERTS)
    """Experts that every token passes through."""
    kind: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu", "geglu_tanh", "reglu"] = "swiglu"
    """Network of each expert, as in `model.feedforward.kind`."""
    router_activation: Literal["sigmoid", "softmax"] = "sigmoid"
    """What turns the router's outputs into gates."""
    normalize: bool = True
    """Gates of the chosen experts sum to one."""
    balance: Literal["none", "bias", "loss"] = "bias"
    """Loss-free bias (arXiv 2408.15664) or the auxiliary loss of Switch Transformer."""
    bias_update_rate: float = Field(1e-3, ge=0.0)
    """balance bias: step by which each expert's bias moves after an optimizer step."""
    aux_loss_coef: float = Field(1e-3, ge=0.0)
    """balance loss: weight of the auxiliary loss."""


class BlockConfig(BaseConfig):
    """How attention and feed-forward are joined into a layer."""

    kind: Literal["serial", "parallel"] = "serial"
    """Attention then feed-forward, or both on the same input, summed (arXiv 2204.02311)."""
    residual: Literal["pre", "sandwich", "deepnorm"] = "pre"
    """Normalize before each branch, before and after it (arXiv 2408.00118), or after each sum with DeepNorm's scaling (2203.00555)."""
    norm: Literal["rms", "layer", "rms_plain"] = "rms"
    """`rms_plain` has no learned gain."""
    eps: PositiveFloat = 1e-6
    """Added to the variance in norms."""


class TokenShiftConfig(BaseConfig):
    """Channels that come from previous tokens."""

    kind: Literal["none", "chunks", "lerp", "smear"] = "none"
    """Groups of channels from earlier tokens, a learned mix with the token before, or a gated share of the embedding before."""
    tokens: Size = 1
    """kind chunks: how many previous tokens take part."""


class ValueEmbeddingConfig(PartConfig):
    """A table looked up by token ids whose rows are mixed into each layer's values."""

    kind: str = "none"
    """`layered` is one table whose rows hold the values of all layers; or `package.module:Class` of a user's own, with keys of its own."""
    init: float = 0.5
    """kind layered: starting share of the table in the mix."""


class SkipsConfig(BaseConfig):
    """Paths around the blocks."""

    first: bool = False
    """Each block's input is a learned mix of the stream and the first embedding."""
    unet: bool = False
    """Blocks of the second half add the outputs of the first half, last in first out."""


class HeadConfig(BaseConfig):
    """The map from the last hidden state to logits."""

    tied: bool = False
    """Use the embedding's table."""
    softcap: float = Field(0.0, ge=0.0)
    """Logits become cap * tanh(logits / cap); 0 is off."""
    bias: bool = False
    """A learned bias for each token."""


class HeadTable(PartConfig):
    """A head besides the language model's: the kind of what it predicts, and keys of its own (config/heads.py)."""

    kind: str = "auto"
    """`token_classification`, `classification`, `multi_label`, `regression`, `preference`, `ranking`, `multi_token`; `auto` follows from
    the corpus's target; or `package.module:Class` of a user's own, with keys of its own."""


class InitConfig(BaseConfig):
    """How weights start."""

    kind: Literal["normal", "zero_projections", "deepnorm"] = "normal"
    """Normal; the same with branch outputs and head at zero; or Xavier with DeepNorm's gain."""
    std: float = Field(0.0, ge=0.0)
    """Standard deviation of `normal`; 0 takes 1/sqrt(fan in)."""


class ModelConfig(BaseConfig):
    """A whole model. The defaults are a plain pre-norm transformer; presets name the interesting ones."""

    vocab_size: Length = 50432
    """Token ids that the model knows; round it up for speed, never below the tokenizer's."""
    max_seq_len: Length = 8192
    """Longest sequence, in tokens."""
    hidden_size: Size = 2560
    """Size of the residual stream."""
    num_layers: int = Field(32, gt=0, le=MAX_LAYERS)
    """Layers."""
    layers: StringTuple = ()
    """Token mixer of each layer by name, repeated over num_layers: `full` is model.attention, any other name a table model.mixers.NAME;
    empty is model.attention in every layer."""
    mixers: dict[str, PartConfig] = Field(default_factory=dict)
    """Token mixers by name: `kind` is `package.module:Class` or a registered one, the other keys are that mixer's own."""
    embedding: EmbeddingConfig = EmbeddingConfig()
    rotary: RotaryConfig = RotaryConfig()
    alibi: AlibiConfig = AlibiConfig()
    attention: AttentionConfig = AttentionConfig()
    feedforward: FeedForwardConfig = FeedForwardConfig()
    experts: ExpertsConfig = ExpertsConfig()
    block: BlockConfig = BlockConfig()
    shift: TokenShiftConfig = TokenShiftConfig()
    value_embedding: ValueEmbeddingConfig = ValueEmbeddingConfig()
    skips: SkipsConfig = SkipsConfig()
    head: HeadConfig = HeadConfig()
    task_heads: dict[str, HeadTable] = Field(default_factory=dict)
    """Heads besides the language model's by name, each of which predicts a target of the corpus (docs/heads.md)."""
    init: InitConfig = InitConfig()
