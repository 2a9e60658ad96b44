"""What is said of a run before its first step."""

from __future__ import annotations

from pathlib import Path

from andromeda.config.run import RunConfig
from andromeda.data.loader import TokenStream
from andromeda.model.transformer import Transformer
from andromeda.train.compile import should_compile
from andromeda.train.manifest import device_name
from andromeda.train.precision import Precision
from andromeda.utils.formatting import format_si


def start_summary(config: RunConfig, model: Transformer, precision: Precision, stream: TokenStream, run: Path) -> list[str]:
    """Lines about the model, what it reads, and where the run is kept."""
    train, seq_len = config.train, config.train.seq_len or config.model.max_seq_len
    parameters = sum(p.numel() for p in model.parameters())
    sequences = train.steps * train.batch_size * max(1, train.diloco.workers)
    epochs = " + ".join(f"{epochs:.3g}" for epochs in stream.epochs(sequences))
    micro = f" in micro-batches of {train.micro_batch_size}" if train.micro_batch_size else ""
    compiled = "compiled" if should_compile(config, precision.device) else "not compiled"
    return [
        f"model       {config.name}, {parameters:,} parameters, {precision.name} on {device_name(precision.device)}, {compiled}",
        f"data        {format_si(sequences * seq_len)} tokens, {epochs} epochs: {train.steps:,} steps of {train.batch_size} sequences of "
        f"{seq_len:,} tokens{micro}",
        f"run folder  {run}",
    ]


COMPILING = "compiling the blocks: the first step takes longer, about half a minute on a CPU, unless they are cached"
