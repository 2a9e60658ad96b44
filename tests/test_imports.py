"""No import circle: modules are imported in one order, whichever is asked for first."""

from __future__ import annotations

import pytest

from tests.source_tree import cycles, imports, trees


def test_no_modules_import_each_other() -> None:
    graph = {module: imports(module) for module in trees()}
    assert not cycles(graph), {(module, other) for circle in cycles(graph) for module in circle for other in graph[module] & set(circle)}


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}}, [("a", "b")]),
        ({"a": {"b", "d"}, "b": {"c"}, "c": {"a"}, "d": {"e"}, "e": {"d"}}, [("a", "b", "c"), ("d", "e")]),
        ({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}, []),
    ],
)
def test_circles_are_found(graph: dict[str, set[str]], found: list[tuple[str, ...]]) -> None:
    assert cycles(graph) == found
