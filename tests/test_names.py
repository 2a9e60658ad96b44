"""One name, one thing: no class twice in the package, no module twice but where a twin is meant."""

from __future__ import annotations

import ast
from collections import defaultdict

from tests.source_tree import trees

TWINS = (
    # A command line's file is called like its command, and the command like the package.
    ("andromeda.cli.", "andromeda."),
    # A part's keys are a file of the configuration.
    ("andromeda.config.", "andromeda."),
    # A part of the model, the operation that computes it, that operation's kernel, and its benchmark.
    ("andromeda.model.", "andromeda.ops."),
    ("andromeda.ops.triton.", "andromeda.ops."),
    ("andromeda.bench.", "andromeda.ops."),
)
"""Packages whose modules are called like those of another because they are about the same thing."""


def classes() -> dict[str, list[str]]:
    """Where each class name is defined, at any depth."""
    found = defaultdict(list)
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(module)
    return found


def modules() -> dict[str, set[str]]:
    """Modules by their last name, those that are twins of another taken out."""
    found = defaultdict(set)
    for module in trees():
        twins = {other + module.removeprefix(package) for package, other in TWINS if module.startswith(package)}
        if not twins & trees().keys():
            found[module.rpartition(".")[2]].add(module)
    return found


def test_no_class_name_is_defined_twice() -> None:
    twice = {name: places for name, places in classes().items() if len(places) > 1}
    assert not twice


def test_no_module_name_is_given_twice() -> None:
    twice = {name: places for name, places in modules().items() if len(places) > 1}
    assert not twice
