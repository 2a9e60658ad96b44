"""What a model is: one typed part for every slot. Rules between parts live in `resolve.py`.

A slot that can be empty has a `kind` whose value `"none"` is the identity; nothing is switched by a missing key.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from andromeda.config.base import Part

BACKENDS = ("auto", "eager", "sdpa", "flash", "cudnn", "flex", "fa4")
"""Attention backends that `attention.backend` may name; `auto` takes the fastest that can compute the pattern."""


class Embedding(Part):
    """How token ids become vectors, and whether the head shares that table."""

    kind: Literal["plain", "factorised", "custom"] = "plain"
    rank: PositiveInt = 128
    """Inner width of a factorised table."""
    provider: str = ""
    """`package.module:Class` of a user's own embedding (kind custom)."""
    absolute: bool = False
    """Add a learned vector for each absolute position."""
    norm: bool = False
    """RMS-normalise the embedded tokens, as the speedrun's model does."""


class Scaling(Part):
    """Frequency scaling that stretches rotary positions over a longer context."""

    kind: Literal["none", "linear", "ntk", "dynamic", "yarn"] = "none"
    factor: float = Field(1.0, ge=1.0)
    """New context length over the original one."""
    original_context: int = Field(0, ge=0)
    """Context the model was trained at; 0 means `context / factor`."""
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    ramp: Literal["index", "rotations"] = "index"
    """YaRN's ramp: over the dimension's index, as the released code and transformers do, or over its rotations, as the paper writes."""


class Rotary(Part):
    """Rotary positions, with or without xPos's decay (arXiv 2104.09864, 2212.10554)."""

    kind: Literal["none", "rope", "xpos"] = "xpos"
    theta: PositiveFloat = 10000.0
    fraction: float = Field(1.0, gt=0.0, le=1.0)
    """Share of each head's dimensions that are rotated."""
    layout: Literal["half", "interleaved"] = "half"
    """Pairs are (i, i + D/2) or (2i, 2i + 1)."""
    scale_base: PositiveInt = 512
    """xPos: distance, in tokens, at which the decay is zeta to the first power."""
    scaling: Scaling = Scaling()


class Alibi(Part):
    """Linear biases on the first `heads` heads (arXiv 2108.12409); 0 heads is off."""

    heads: int = Field(0, ge=0)
    fold: bool = False
    """Carry the bias in four reserved dimensions of each head, so that any causal kernel computes it."""
    scale: PositiveFloat = 1.0
    """Divides every slope: the rule by which ALiBi is stretched over a longer context."""


class Attention(Part):
    """Heads, their normalisation, their reach, and the kernel that computes them."""

    mechanism: str = "softmax"
    """A registered mechanism, or `package.module:Class` of a user's own."""
    heads: PositiveInt = 24
    kv_heads: PositiveInt = 1
    head_dim: PositiveInt = 128
    bias: bool = False
    qk_norm: Literal["none", "l2", "l2_head_scale", "l2_dim_scale", "rms"] = "none"
    scale: float = Field(0.0, ge=0.0)
    """Softmax scale; 0 takes the QK norm's own (10 for l2, 1/sqrt(D) otherwise)."""
    softcap: float = Field(0.0, ge=0.0)
    """Attention logits become cap * tanh(logits / cap); 0 is off."""
    window: int = Field(0, ge=0)
    """Tokens that a query sees, itself included; 0 is all."""
    global_every: int = Field(0, ge=0)
    """With a window: every n-th layer sees everything; 0 is none."""
    backend: str = "auto"


class FeedForward(Part):
    """The position-wise network."""

    kind: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu", "reglu", "moe"] = "gelu"
    hidden: int = Field(0, ge=0)
    """Inner width; 0 takes `mult` times the model's width (for gated kinds two thirds of that, to 64)."""
    mult: PositiveFloat = 4.0
    bias: bool = False


class Experts(Part):
    """Mixture of experts (feedforward.kind moe): dropless top-k routing."""

    count: PositiveInt = 8
    active: PositiveInt = 2
    shared: int = Field(0, ge=0)
    """Experts that every token passes through."""
    kind: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu", "reglu"] = "swiglu"
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    normalise: bool = True
    """Gates of the chosen experts sum to one."""
    balance: Literal["none", "bias", "loss"] = "bias"
    """Loss-free bias (arXiv 2408.15664) or the auxiliary loss of Switch Transformer."""
    rate: float = Field(1e-3, ge=0.0)
    """Step of the bias, or weight of the auxiliary loss."""


class Block(Part):
    """How attention and feed-forward are joined into a layer."""

    kind: Literal["serial", "parallel"] = "serial"
    residual: Literal["pre", "deepnorm"] = "pre"
    norm: Literal["rms", "layer", "rms_plain"] = "rms"
    """`rms_plain` has no learned gain."""
    eps: PositiveFloat = 1e-6


class Shift(Part):
    """Channels that come from previous tokens."""

    kind: Literal["none", "chunks", "lerp", "smear"] = "none"
    tokens: PositiveInt = 1
    """kind chunks: how many previous tokens take part."""


class ValueEmbedding(Part):
    """A table of depth x width whose chunk is mixed into each layer's values."""

    kind: Literal["none", "layered"] = "none"
    init: float = 0.5
    """Starting share of the table in the mix."""


class Skips(Part):
    """Paths around the blocks."""

    first: bool = False
    """Each block's input is a learned mix of the stream and the first embedding."""
    unet: bool = False
    """Blocks of the second half add the outputs of the first half, last in first out."""


class Head(Part):
    """The map from the last hidden state to logits."""

    tied: bool = False
    softcap: float = Field(0.0, ge=0.0)
    """Logits become cap * tanh(logits / cap); 0 is off."""
    bias: bool = False


class Init(Part):
    """How weights start."""

    kind: Literal["normal", "zero_projections", "deepnorm"] = "normal"
    std: float = Field(0.0, ge=0.0)
    """Standard deviation of `normal`; 0 takes 1/sqrt(fan in)."""


class ModelConfig(Part):
    """A whole model. The defaults are a small pre-norm transformer; presets name the interesting ones."""

    vocab_size: PositiveInt = 50432
    context: PositiveInt = 8192
    """Longest sequence, in tokens."""
    width: PositiveInt = 2560
    depth: PositiveInt = 32
    embedding: Embedding = Embedding()
    rotary: Rotary = Rotary()
    alibi: Alibi = Alibi()
    attention: Attention = Attention()
    feedforward: FeedForward = FeedForward()
    experts: Experts = Experts()
    block: Block = Block()
    shift: Shift = Shift()
    value_embedding: ValueEmbedding = ValueEmbedding()
    skips: Skips = Skips()
    head: Head = Head()
    init: Init = Init()
