"""The package's own source, read by Python's parser: modules, classes, imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "andromeda"


@cache
def trees() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name, parsed."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text("utf-8"), str(path))
    return found


def is_package(module: str) -> bool:
    """Whether a module is a folder's `__init__`."""
    return (ROOT / module.replace(".", "/") / "__init__.py").exists()


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below one, function bodies too, but none that only a type checker sees (`if TYPE_CHECKING:`)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from (other, *statements(other))
        else:
            yield from (child, *statements(child))


def ancestors(module: str) -> set[str]:
    """The packages that a module lies in, but the root: importing it runs their `__init__` first."""
    parts = module.split(".")
    return {".".join(parts[:n]) for n in range(2, len(parts))}


def imports(module: str) -> set[str]:
    """The package's modules that one imports, at its top or in a function, with those packages that run because of it."""
    found = set()
    for node in statements(trees()[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.rsplit(".", node.level)[0] + "." if node.level else ""
            for alias in node.names:
                whole = f"{base}{node.module}.{alias.name}"
                found.add(whole if whole in trees() else f"{base}{node.module}")
    found &= trees().keys()
    for name in list(found):
        found |= ancestors(name) - ancestors(module)
    return found - {module, PACKAGE}


def cycles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """The groups of two or more nodes that reach one another (strongly connected components, Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(tuple(sorted(group)))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted(found)
