"""The covering array itself: nothing legal is left out, and what is left out is refused for a reason."""

from __future__ import annotations

from itertools import combinations

import pytest

from andromeda.config.derived import content_dim, rotated_dims
from andromeda.utils.errors import ConfigError
from tests.conformance.covering import CHOICES, legal_pairs, model_config, rows

REFUSED = [
    ({"position": "nope", "scaling": "yarn"}, "rotary.scaling"),
    ({"position": "alibi-folded", "softcap": "capped"}, "alibi.fold_into_qk"),
    ({"position": "xpos+alibi-folded", "mechanism": "sigmoid"}, "alibi.fold_into_qk"),
    ({"position": "xpos|alibi", "heads": "mqa"}, "rotary.heads"),
    ({"block": "deepnorm", "skips": "unet"}, "skips"),
    ({"block": "deepnorm", "init": "zero"}, "zero_projections"),
    ({"embedding": "factorized", "head": "tied"}, "tied"),
    ({"head": "tied", "init": "zero"}, "tied"),
    ({"layers": "linear-full", "values": "embedded"}, "value_embedding"),
]


def test_every_value_occurs_and_few_pairs_are_refused() -> None:
    found = {choice for pair in legal_pairs() for choice in pair}
    assert found == set(CHOICES)
    pairs = {frozenset(pair) for pair in combinations(CHOICES, 2) if pair[0][0] != pair[1][0]}
    refused = pairs - legal_pairs()
    # The linear attention of the examples takes no value embeddings, and goes with everything else.
    of_the_example = {pair for pair in refused if ("layers", "linear-full") in pair}
    assert of_the_example == {frozenset([("layers", "linear-full"), ("values", "embedded")])}
    assert len(refused - of_the_example) < 40


@pytest.mark.parametrize(("choices", "word"), REFUSED)
def test_pairs_left_out_are_refused_in_one_sentence(choices: dict[str, str], word: str) -> None:
    with pytest.raises(ConfigError, match=word) as error:
        model_config(choices)
    assert frozenset(choices.items()) not in legal_pairs()
    assert str(error.value).count(".\n") == 0
    assert str(error.value).endswith(".")


def test_rows_are_as_different_as_their_names_say() -> None:
    configs = list(rows().values())
    assert len({config.model_dump_json() for config in configs}) == len(configs)
    assert {config.attention.num_kv_heads for config in configs} == {1, 3, 4}
    assert {rotated_dims(c) / content_dim(c) for c in configs if c.rotary.kind != "none"} == {0.25, 0.5, 1.0}
