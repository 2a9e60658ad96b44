"""The names that a user may rely on: no more and no fewer than those that are meant."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys

import pytest

import andromeda
from andromeda import Andromeda
from andromeda.model.transformer import Transformer
from tests.source_tree import is_package, trees

METHODS = {"from_preset", "from_run", "save", "generate", "num_parameters", "optimize_for_inference", "from_pretrained", "save_pretrained"}
"""Of Andromeda, apart from what it is as a `torch.nn.Module`."""


def test_the_package_gives_two_names() -> None:
    assert dir(andromeda) == ["Andromeda", "__version__"]
    assert andromeda.__all__ == dir(andromeda)


def test_nothing_else_is_there_by_accident() -> None:
    """In a process of its own, since submodules that a test imported are attributes too."""
    code = "import andromeda; print(sorted(name for name in vars(andromeda) if not name.startswith('_')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_model_has_the_methods_that_are_meant() -> None:
    own = {name for name in vars(Andromeda) if not name.startswith("_")}
    assert own == METHODS
    assert own.isdisjoint(vars(Transformer))


def exports(tree: ast.Module) -> set[str]:
    """Public names that a package's `__init__` binds: what it defines, and what it takes from its own modules."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names if str(node.module) != "__future__"}
        elif isinstance(node, ast.Import):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in found if not name.startswith("_")}


PACKAGES = [module for module, tree in trees().items() if is_package(module) and module != "andromeda" and exports(tree)]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_that_gives_names_says_which(package: str) -> None:
    given = getattr(importlib.import_module(package), "__all__", None)
    assert given, f"{package} binds names and has no __all__."
    assert set(given) <= exports(trees()[package]), "a name of __all__ that the file does not bind"
