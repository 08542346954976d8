"""A module's `forward` replaced on the module itself: its class, names and tensors stay, and a copy of it is without that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


class Replaced(partial[Any]):
    """What a module's `forward` is replaced by. The compiler sees a `partial`, and equal modules share a graph."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return the `forward` of the class, bound to the module's copy."""
        copied = memo[id(self.args[0])]
        return type(copied).forward.__get__(copied)


def replace(module: nn.Module, function: Callable[..., Any], *given: Any, kind: type[Replaced] = Replaced) -> None:
    """Have a module computed by function(module, *given, ...) in place of its class's `forward`."""
    held: Any = module
    held.forward = kind(function, module, *given)


def replacement(module: nn.Module, function: Callable[..., Any]) -> Replaced | None:
    """Return what replaces a module's `forward`, if that is this function."""
    found = vars(module).get("forward")
    return found if isinstance(found, Replaced) and found.func is function else None
