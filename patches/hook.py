# SPDX-License-Identifier: Apache-2.0
"""One change to SGLang: what is hooked, how, by which function, and what that relies on."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal


@dataclass(frozen=True)
class Hook:
    """A hook for SGLang's HookRegistry.

    Attributes:
        target: dotted name of the function or method.
        kind: "before" may change the arguments, "after" the result, "around" calls the original.
        function: see `sglang.srt.plugins.hook_registry` for its arguments.
        parameters: names of the target's first parameters, in order; all of them where `function` takes no others.
        uses: dotted names of what else of SGLang `function` relies on: functions, and attributes of classes, also
            those that only instances have.
    """

    target: str
    kind: Literal["before", "after", "around"]
    function: Callable[..., Any]
    parameters: tuple[str, ...]
    uses: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """That holds the patch, from the package's folder."""
        return f"patches/{self.function.__module__.rpartition('.')[2]}.py"

    def register(self) -> None:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register(self.target, self.function, HookType(self.kind))

    def is_applied(self) -> bool:
        """Whether the target's chain of wrappers holds our function."""
        target = _resolve(self.target)
        return any(wrapper is self.function for wrapper in _wrapped_by(target))

    def find_faults(self) -> list[str]:
        """In what the installed SGLang differs from what the function was written for, as name, expected, got."""
        missing = [name for name in self.uses if not _exists(name)]
        faults = [f"{self.file}: {name}: expected to exist, got none" for name in missing]
        target = _resolve(self.target)
        if target is None:
            return [f"{self.file}: {self.target}: expected a function, got none", *faults]
        # The signature of the innermost function: each wrapper of SGLang's names the one that it wraps.
        found = tuple(inspect.signature(getattr(target, "__func__", target)).parameters)
        takes_others = _takes_others(self.function)
        if (found[: len(self.parameters)] if takes_others else found) != self.parameters:
            expected = ", ".join((*self.parameters, *(["..."] if takes_others else [])))
            faults.insert(0, f"{self.file}: {self.target}: expected parameters ({expected}), got ({', '.join(found)})")
        return faults


def _resolve(name: str) -> Any:
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return None


def _exists(name: str) -> bool:
    if _resolve(name) is not None:
        return True
    owner, _, attribute = name.rpartition(".")
    return inspect.isclass(kind := _resolve(owner)) and attribute in _names_in(kind)


def _names_in(kind: type) -> Iterator[str]:
    """Of the fields of a class, and of all that its functions' code names: what they read or set on `self`, and text
    such as getattr's."""
    for base in kind.__mro__:
        yield from vars(base).get("__annotations__", ())
        for value in vars(base).values():
            function = inspect.unwrap(getattr(value, "__func__", value))
            if isinstance(code := getattr(function, "__code__", None), CodeType):
                yield from code.co_names
                yield from (text for text in code.co_consts if isinstance(text, str))


def _takes_others(function: Callable[..., Any]) -> bool:
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    return {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds


def _wrapped_by(function: Any) -> Iterator[Any]:
    """The hooks around `function`: SGLang keeps each in the closure of its wrapper."""
    while function is not None:
        function = getattr(function, "__func__", function)
        for cell in getattr(function, "__closure__", None) or ():
            yield cell.cell_contents
        function = getattr(function, "__wrapped__", None)
