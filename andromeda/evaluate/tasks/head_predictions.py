"""The evaluation of heads: what each predicts on held-out documents, compared with their targets."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from andromeda.config import heads as kinds
from andromeda.config.base import BaseConfig
from andromeda.config.validation_errors import validate
from andromeda.data.loader import TokenStream, open_stream
from andromeda.evaluate import head_metrics
from andromeda.evaluate.loaded_model import LoadedModel
from andromeda.evaluate.request import EvalOptions, Measurement
from andromeda.generate.engine import eval_mode
from andromeda.loss.head_tasks import ahead_targets, likelihood_of
from andromeda.loss.likelihoods import NOT_LABELED, Numeric, head_outputs
from andromeda.loss.ranking import PlackettLuce
from andromeda.ops.cross_entropy import IGNORE_INDEX
from andromeda.train.build_objective import check_head_targets
from andromeda.train.objective import MicroBatch
from andromeda.utils.errors import DataError, RequestError
from andromeda.utils.progress_callback import ProgressCallback

SEQUENCES, AT_ONCE = 1024, 8
NORMAL_90 = 1.6448536269514722
"""Half-width of the interval that holds nine tenths of a normal distribution, in standard deviations."""
Found = dict[str, list[np.ndarray]]
"""Predictions and truth, an array for each batch."""


class HeadsSettings(BaseConfig):
    """At most `sequences` of the held-out sequences of the run's length, spread evenly."""

    corpus: str = ""
    sequences: PositiveInt


class HeadsEvaluation:
    """Every head of the run."""

    kind = "heads"

    def settings(self, options: EvalOptions, loaded: LoadedModel) -> list[BaseConfig]:
        """All held-out sequences, at most 1,024 by default."""
        if not loaded.config.model.task_heads:
            raise RequestError(f"{loaded.run} has no heads besides the language model's: declare them in model.task_heads and train.")
        return [HeadsSettings(corpus=options.corpus, sequences=options.samples or SEQUENCES)]

    def read(self, values: dict[str, Any]) -> HeadsSettings:
        """Settings that were stored."""
        return validate(HeadsSettings, values)

    def measure(self, loaded: LoadedModel, settings: HeadsSettings, report: ProgressCallback) -> Measurement:
        """The figures of each head by name; a head without targets in the sequences is left out."""
        config = loaded.config
        data = config.data.model_copy(update={"workers": 0} | ({"corpus": settings.corpus, "sources": ()} if settings.corpus else {}))
        stream = open_stream(data, config.train.seq_len or config.model.max_seq_len, config.seed, "val")
        check_head_targets(config.model, stream.targets)
        found = _predictions(loaded, stream, settings.sequences, config.data.document_mask, report)
        result = {name: _figures(keys, found[name]) for name, keys in kinds.heads_of(config.model).items() if found[name]}
        if not result:
            raise DataError("The held-out documents have no targets for the heads of this run: build the corpus with more of them.")
        return Measurement(self.kind, stream.fingerprint, result)


@torch.no_grad()
def _predictions(loaded: LoadedModel, stream: TokenStream, most: int, document_mask: bool, report: ProgressCallback) -> dict[str, Found]:
    """Predictions and truth of each head on sequences at equal distances."""
    model, known = loaded.model, kinds.heads_of(loaded.config.model)
    available = stream.num_sequences or 0
    count = min(most, available)
    rows = [i * available // count for i in range(count)]
    found: dict[str, Found] = defaultdict(lambda: defaultdict(list))
    with eval_mode(model):
        for start in range(0, count, AT_ONCE):
            batch = MicroBatch.from_batch(stream.gather(rows[start : start + AT_ONCE]), document_mask).to(loaded.device)
            hidden = model.hidden(batch.ids, documents=batch.documents)
            for name, keys in known.items():
                if isinstance(keys, kinds.MultiTokenConfig):
                    values = _ahead(model, name, keys, hidden, batch)
                else:
                    outputs = head_outputs(model.task_heads[name], hidden)  # type: ignore[arg-type]
                    values = _counted(keys, outputs, batch.head_targets[keys.target or name])
                for key, value in values.items():
                    if len(value):
                        found[name][key].append(value.double().cpu().numpy())
            report("heads", min(start + AT_ONCE, count), count)
    return found


def _ahead(model: Any, name: str, keys: kinds.MultiTokenConfig, hidden: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
    """Whether the most likely token is the right one, for each distance."""
    values = {}
    for ahead in range(2, keys.tokens + 1):
        truth = ahead_targets(batch, ahead)
        counted = truth != IGNORE_INDEX
        logits = model.head(model.task_heads[name](hidden[counted], ahead))
        values[f"accuracy_{ahead}"] = logits.argmax(-1) == truth[counted]
    return values


def _counted(keys: kinds.HeadKeys, outputs: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Outputs (B, T, K) and truth where there is a target."""
    likelihood = likelihood_of(keys)
    if isinstance(likelihood, PlackettLuce):
        scores, present = likelihood.scores(truth, outputs)
        first, second = torch.triu_indices(scores.shape[1], scores.shape[1], 1, device=scores.device)
        both = present[:, first] & present[:, second]
        return {"better": scores[:, first][both], "worse": scores[:, second][both]}
    if isinstance(likelihood, Numeric):
        counted = ~truth.isnan()
        values = {"predicted": likelihood.predict(outputs)[counted], "truth": truth[counted]}
        return values | ({"scale": likelihood.log_scale(outputs)[counted].exp() * likelihood.scale} if likelihood.learn_scale else {})
    if isinstance(keys, kinds.MultiLabelConfig):
        counted = (truth != NOT_LABELED).any(-1)
        return {"probabilities": outputs[counted].sigmoid(), "truth": truth[counted]}
    counted = truth != IGNORE_INDEX
    return {"probabilities": outputs[counted].softmax(-1), "truth": truth[counted]}


def _figures(keys: kinds.HeadKeys, found: Found) -> dict[str, float]:
    value = {key: np.concatenate(arrays) for key, arrays in found.items()}
    if isinstance(keys, kinds.MultiTokenConfig):
        return {key: float(right.mean()) for key, right in value.items()}
    if isinstance(keys, kinds.PreferenceConfig | kinds.RankingConfig):
        return head_metrics.preference(value["better"], value["worse"])
    if isinstance(keys, kinds.MultiLabelConfig):
        return head_metrics.multi_label(value["probabilities"], value["truth"])
    if isinstance(keys, kinds.TokenClassificationConfig):
        return head_metrics.classification(value["probabilities"], value["truth"])
    figures = head_metrics.regression(value["predicted"], value["truth"])
    if "scale" in value:
        assert isinstance(keys, kinds.RegressionConfig)
        half = NORMAL_90 if keys.likelihood == "gaussian" else np.log(10)
        figures["coverage_90"] = head_metrics.interval_coverage(value["predicted"], half * value["scale"], value["truth"])
    return figures
