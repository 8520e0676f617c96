# SPDX-License-Identifier: Apache-2.0
"""One change to SGLang: what is hooked, how, and by which function."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Hook:
    """A hook for SGLang's HookRegistry.

    Attributes:
        target: dotted name of the function or method.
        kind: "before" may change the arguments, "after" the result, "around" calls the original.
        function: see `sglang.srt.plugins.hook_registry` for its arguments.
    """

    target: str
    kind: Literal["before", "after", "around"]
    function: Callable[..., Any]

    def register(self) -> None:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register(self.target, self.function, HookType(self.kind))

    def is_applied(self) -> bool:
        """Whether the target's chain of wrappers holds our function."""
        try:
            target = pkgutil.resolve_name(self.target)
        except (ImportError, AttributeError):
            return False
        return any(wrapper is self.function for wrapper in _wrapped_by(target))


def _wrapped_by(function: Any) -> Iterator[Any]:
    """The hooks around `function`: SGLang keeps each in the closure of its wrapper."""
    while function is not None:
        function = getattr(function, "__func__", function)
        for cell in getattr(function, "__closure__", None) or ():
            yield cell.cell_contents
        function = getattr(function, "__wrapped__", None)
