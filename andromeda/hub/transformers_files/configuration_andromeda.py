"""Configuration of an Andromeda model for transformers: the tables of the run's `[model]`, under the names that transformers expects."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class AndromedaConfig(PretrainedConfig):
    """A decoder-only language model. Each table (attention, rotary, feedforward, ...) names a part and its settings."""

    model_type = "andromeda"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 256,
        max_position_embeddings: int = 512,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        attention: dict[str, Any] | None = None,
        rotary: dict[str, Any] | None = None,
        alibi: dict[str, Any] | None = None,
        embedding: dict[str, Any] | None = None,
        feedforward: dict[str, Any] | None = None,
        experts: dict[str, Any] | None = None,
        block: dict[str, Any] | None = None,
        shift: dict[str, Any] | None = None,
        value_embedding: dict[str, Any] | None = None,
        skips: dict[str, Any] | None = None,
        head: dict[str, Any] | None = None,
        layers: list[str] | None = None,
        mixers: dict[str, dict[str, Any]] | None = None,
        quantization: str = "",
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.max_position_embeddings = vocab_size, max_position_embeddings
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.use_cache, self.quantization = use_cache, quantization
        self.attention = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 32} | (attention or {})
        self.rotary = {"kind": "rope", "theta": 10000.0} | (rotary or {})
        self.alibi = {"num_heads": 0} | (alibi or {})
        self.embedding = {"kind": "plain"} | (embedding or {})
        self.feedforward = {"kind": "swiglu", "intermediate_size": 4 * hidden_size} | (feedforward or {})
        self.experts = experts or {}
        self.block = {"kind": "serial", "residual": "pre", "norm": "rms", "eps": 1e-6} | (block or {})
        self.shift = {"kind": "none"} | (shift or {})
        self.value_embedding = {"kind": "none"} | (value_embedding or {})
        self.skips = {"first": False, "unet": False} | (skips or {})
        self.head = {"softcap": 0.0, "bias": False} | (head or {})
        self.layers, self.mixers = layers or [], mixers or {}
        # What libraries around transformers look for.
        self.num_attention_heads, self.num_key_value_heads = self.attention["num_heads"], self.attention["num_kv_heads"]
        self.head_dim, self.intermediate_size = self.attention["head_dim"], self.feedforward["intermediate_size"]
        self.final_logit_softcapping = self.head["softcap"] or None
        windows = [self.window_of(layer) for layer in range(num_hidden_layers)]
        self.sliding_window = max(windows, default=0) or None
        self.layer_types = ["sliding_attention" if window else "full_attention" for window in windows]
        for derived in (
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "final_logit_softcapping",
            "sliding_window",
            "layer_types",
        ):
            kwargs.pop(derived, None)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    def attention_of(self, layer: int) -> dict[str, Any]:
        """The table `attention` as a layer has it: a mixer of its own (`layers` names it, `mixers` has its keys) changes some of them."""
        name = self.layers[layer % len(self.layers)] if self.layers else ""
        given = self.mixers.get(name)
        if given is None:
            return self.attention
        every = {"full_attention_interval": 0} if "sliding_window" in given else {}
        return self.attention | {"mixer": given["kind"]} | {key: value for key, value in given.items() if key != "kind"} | every

    def window_of(self, layer: int) -> int:
        """Tokens that a layer's queries see, 0 for all."""
        a = self.attention_of(layer)
        every = a.get("full_attention_interval", 0)
        return 0 if every and (layer + 1) % every == 0 else a.get("sliding_window", 0)
