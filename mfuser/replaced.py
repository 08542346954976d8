"""A module's `forward` replaced on the module itself: its class, names and tensors stay, and a copy of it is without that."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

_KEPT = "replaced_forward"  # a module's attribute, in front of its `forward`


class Replaced:
    """What a module is computed by in place of its class's `forward`: function(module, *given, ...)."""

    def __init__(self, module: nn.Module, function: Callable[..., Any], given: tuple[Any, ...]) -> None:
        self.module, self.function, self.given = module, function, given

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Give the copy of the module its class's `forward`, which would be copied next; the copy has nothing in this place."""
        copied = memo[id(self.module)]
        memo[id(vars(self.module)["forward"])] = type(copied).forward.__get__(copied)


def replace(module: nn.Module, function: Callable[..., Any], *given: Any, kind: type[Replaced] = Replaced) -> None:
    """Have a module computed by function(module, *given, ...) in place of its class's `forward`.

    The compiler has one graph for equal modules: it tells partials apart, in torch 2.11, and not methods.
    """
    held = vars(module)
    held.pop("forward", None)
    held[_KEPT] = kind(module, function, given)
    held["forward"] = MethodType(_forward, module)


def replacement(module: nn.Module, function: Callable[..., Any]) -> Replaced | None:
    """Return what replaces a module's `forward`, if that is this function."""
    found = vars(module).get(_KEPT)
    return found if isinstance(found, Replaced) and found.function is function else None


def _forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    kept: Replaced = module.replaced_forward
    return kept.function(module, *kept.given, *args, **kwargs)
