"""Names of parameters: a run's checkpoints on one side, the exported modeling file (and Llama's classes) on the other."""

from __future__ import annotations

import re

RULES: tuple[tuple[str, str], ...] = (
    (r"embedding\.tokens\.(weight|table\.weight|project\.weight)", r"model.embed_tokens.{}"),
    (r"embedding\.absolute\.table\.weight", "model.embed_positions.weight"),
    (r"embedding\.smear\.(gate\.weight|weight)", "model.smear.{}"),
    (r"value_embedding\.table\.weight", "model.embed_values.weight"),
    (r"decoder\.skip_weights", "model.skip_weights"),
    (r"decoder\.mixes\.(\d+)\.weights", "model.layers.{}.first_mix"),
    (r"decoder\.blocks\.(\d+)\.(?:attention_norm|norm)\.weight", "model.layers.{}.input_layernorm.weight"),
    (r"decoder\.blocks\.(\d+)\.feedforward_norm\.weight", "model.layers.{}.post_attention_layernorm.weight"),
    (r"decoder\.blocks\.(\d+)\.(attention_out_norm|feedforward_out_norm)\.weight", "model.layers.{}.{}.weight"),
    (r"decoder\.blocks\.(\d+)\.(?:attention_shift|shift)\.mix", "model.layers.{}.input_shift.mix"),
    (r"decoder\.blocks\.(\d+)\.feedforward_shift\.mix", "model.layers.{}.mlp_shift.mix"),
    (r"decoder\.blocks\.(\d+)\.attention\.query\.(weight|bias)", "model.layers.{}.self_attn.q_proj.{}"),
    (r"decoder\.blocks\.(\d+)\.attention\.key\.(weight|bias)", "model.layers.{}.self_attn.k_proj.{}"),
    (r"decoder\.blocks\.(\d+)\.attention\.value\.(weight|bias)", "model.layers.{}.self_attn.v_proj.{}"),
    (r"decoder\.blocks\.(\d+)\.attention\.out\.(weight|bias)", "model.layers.{}.self_attn.o_proj.{}"),
    (r"decoder\.blocks\.(\d+)\.attention\.qk_norm\.(\w+)", "model.layers.{}.self_attn.qk_norm.{}"),
    (r"decoder\.blocks\.(\d+)\.attention\.value_mix\.weight", "model.layers.{}.self_attn.value_mix"),
    (r"decoder\.blocks\.(\d+)\.feedforward\.gate\.(weight|bias)", "model.layers.{}.mlp.gate_proj.{}"),
    (r"decoder\.blocks\.(\d+)\.feedforward\.inner\.(weight|bias)", "model.layers.{}.mlp.up_proj.{}"),
    (r"decoder\.blocks\.(\d+)\.feedforward\.out\.(weight|bias)", "model.layers.{}.mlp.down_proj.{}"),
    (r"decoder\.blocks\.(\d+)\.feedforward\.router\.project\.weight", "model.layers.{}.mlp.router.weight"),
    (r"decoder\.blocks\.(\d+)\.feedforward\.router\.votes", "model.layers.{}.mlp.router.votes"),
    (r"decoder\.blocks\.(\d+)\.feedforward\.experts\.gate", "model.layers.{}.mlp.experts.gate_proj"),
    (r"decoder\.blocks\.(\d+)\.feedforward\.experts\.inner", "model.layers.{}.mlp.experts.up_proj"),
    (r"decoder\.blocks\.(\d+)\.feedforward\.experts\.out", "model.layers.{}.mlp.experts.down_proj"),
    (r"decoder\.blocks\.(\d+)\.feedforward\.shared\.(\d+)\.gate\.weight", "model.layers.{}.mlp.shared_experts.{}.gate_proj.weight"),
    (r"decoder\.blocks\.(\d+)\.feedforward\.shared\.(\d+)\.inner\.weight", "model.layers.{}.mlp.shared_experts.{}.up_proj.weight"),
    (r"decoder\.blocks\.(\d+)\.feedforward\.shared\.(\d+)\.out\.weight", "model.layers.{}.mlp.shared_experts.{}.down_proj.weight"),
    (r"norm\.weight", "model.norm.weight"),
    (r"head\.(weight|bias)", "lm_head.{}"),
)
"""What a run calls a parameter (a pattern for the whole name), and what the modeling file calls it, its groups filled in."""

COUNTERS = re.compile(r"decoder\.blocks\.\d+\.feedforward\.router\.load")
"""Kept in checkpoints for training alone."""


def hub_name(name: str) -> str | None:
    """The modeling file's name of a run's parameter; None where it knows no such parameter."""
    for pattern, template in RULES:
        if found := re.fullmatch(pattern, name):
            return template.format(*found.groups())
    return None
