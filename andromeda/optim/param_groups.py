"""The role of every parameter: what it is decides which optimizer updates it, and how fast.

Four roles, after Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon/): hidden matrices have a spectral
geometry that Muon uses, while tables, the head and vectors have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from torch import nn

from andromeda.utils.errors import ConfigError, nearest

Role = Literal["embedding", "head", "matrix", "scalar"]
ROLES: tuple[Role, ...] = get_args(Role)
"""In order of precedence: a weight that several modules share takes the first of their roles."""


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter, by the name under which `model.named_parameters()` lists it.

    In order: `parameter.role`; fewer than two dimensions is a scalar; the `role` of the nearest module above that has one;
    a parameter of `nn.Embedding` is an embedding; one below a module called `head` is the head; all others are matrices
    (the last two dimensions; leading ones, such as experts, are a batch of matrices). A tied head counts once, as embedding.

    Raises ConfigError for a role that does not exist.
    """
    claims: dict[int, list[Role]] = {}
    for parameter, role in _claims(model, "", None):
        claims.setdefault(id(parameter), []).append(role)
    return {
        name: _checked(name, explicit) if (explicit := getattr(p, "role", None)) is not None else min(claims[id(p)], key=ROLES.index)
        for name, p in model.named_parameters()
    }


def _claims(module: nn.Module, path: str, inherited: Role | None) -> Iterator[tuple[nn.Parameter, Role]]:
    """Each parameter with the role that its own module gives it; a shared one comes once for every module that holds it."""
    own = getattr(module, "role", None)
    above = inherited if own is None else _checked(path or "the model", own)
    for parameter in module._parameters.values():
        if parameter is not None:
            yield parameter, _claim(module, path, parameter, above)
    for name, child in module.named_children():
        yield from _claims(child, f"{path}.{name}" if path else name, above)


def _claim(module: nn.Module, path: str, parameter: nn.Parameter, above: Role | None) -> Role:
    if parameter.ndim < 2:
        return "scalar"
    if above is not None:
        return above
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "head" if "head" in path.split(".") else "matrix"


def _checked(owner: str, role: object) -> Role:
    if role not in ROLES:
        raise ConfigError(f"{owner} has the role {role!r}{nearest(str(role), ROLES)}: give it one of {', '.join(ROLES)}.")
    return role
