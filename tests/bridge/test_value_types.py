import math
from typing import Any

import pytest

from bridge.errors import ConfigError, UnsupportedModelError
from bridge.families import provider_of
from bridge.provider import GPTModelProvider
from bridge.value_types import Count, Layers, fits, shown

Sizes = tuple[Count, Count]


@pytest.mark.parametrize(
    ("kind", "those", "others"),
    [
        (int, [0, -3], [True, 1.0, "1", None]),
        (bool, [True, False], [0, 1, "true", None]),
        (float, [1, 1.5, math.inf], [True, "1.5", None]),
        (str, ["", "x"], [1, ["x"], None]),
        (Count, [1, 7], [0, -1, True, 1.0, None]),
        (Layers, [1, 126], [0, True, 10**9, None]),
        (Count | None, [1, None], [0, "x"]),
        (int | list[int] | None, [1, [1, 0], [], None], [[1, "0"], [[1]], [True], {}]),
        (Sizes, [[1, 2], (1, 2)], [[1], [0, 1], [1, 2, 3], 1, "ab"]),
        (dict[str, float] | None, [{}, {"a": 1}, None], [{"a": "1"}, [], "x"]),
        (Any, [None, [], 1], []),
    ],
)
def test_what_fits_a_type(kind: Any, those: list[Any], others: list[Any]) -> None:
    assert [value for value in those if not fits(value, kind)] == []
    assert [value for value in others if fits(value, kind)] == []


def test_types_are_shown_in_words() -> None:
    kinds = (int | None, list[int] | Count, dict[str, Any] | None, Sizes)
    assert [shown(kind) for kind in kinds] == [
        "int or null",
        "list[int] or an int of 1 or more",
        "an object or null",
        "[an int of 1 or more, an int of 1 or more]",
    ]


SETTINGS = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 8,
    "vocab_size": 160,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": "x"}, "model.rope_parameters is 'x': expected an object"),
        ({"num_layers": "2"}, "model.num_layers is '2': expected int"),
        ({"share_embeddings_and_output_weights": "no"}, "expected bool"),
        ({"window_size": ["a", 0]}, r"model.window_size is \('a', 0\): expected \[int, int\] or null"),
        ({"num_layers": 10**9}, "num_layers is 1000000000, .*: at most 250000 experts in all layers"),
        ({"num_moe_experts": 10**9, "moe_router_topk": 1}, "num_moe_experts 1000000000: at most 250000"),
        ({"num_query_groups": -8}, "model.num_query_groups is -8: give a positive number"),
    ],
)
def test_a_description_of_other_types_is_refused(change: dict[str, Any], message: str) -> None:
    """As in a model.json that was edited by hand."""
    GPTModelProvider.from_dict(SETTINGS).finalize()
    with pytest.raises(ConfigError, match=message):
        GPTModelProvider.from_dict({**SETTINGS, **change}).finalize()


def test_layers_beyond_all_measure_are_refused_before_they_are_counted() -> None:
    """A list with an entry for each would take all memory."""
    config = {"model_type": "gemma3_text", "num_hidden_layers": 10**9}
    with pytest.raises(UnsupportedModelError, match="num_hidden_layers 1000000000: expected an int of 1 to"):
        provider_of(config)
