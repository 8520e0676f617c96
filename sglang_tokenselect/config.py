# SPDX-License-Identifier: Apache-2.0
"""The configuration: every option, its default, its bounds and its help text, written once.

Flags (flags.py), the README's table (tests/unit/test_docs.py) and `sgl.Engine` read them from here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from sglang_tokenselect.kernels.reference.window import Window


class ConfigError(ValueError):
    """An unknown or impossible setting, told as name, expected, got."""

    def __init__(self, name: str, expected: str, got: object) -> None:
        super().__init__(f"tokenselect {name}: expected {expected}, got {got!r}")


DEFAULT_MIN_LEN = 20480
"""Beyond, reuse was faster than dense attention for any number of requests (README, "Speed")."""


def _option(default: Any, help: str, **bounds: Any) -> Any:
    return field(default=default, metadata={"help": help, **bounds})


@dataclass(frozen=True)
class TokenSelectConfig:
    """What TokenSelect computes. Sizes are in tokens; names follow the paper's terms."""

    budget: int = _option(2048, "tokens attended beside sink and local, chosen by the heads' soft vote", minimum=0)
    sink: int = _option(128, "first tokens of a request, always attended", minimum=0)
    local: int = _option(512, "last tokens of a request, always attended", minimum=1)
    block: int = _option(128, "prefill queries that share one selection", minimum=1)
    sub_block: int = _option(16, "prefill queries whose mean casts one row of votes; divides the block", minimum=1)
    combine: str = _option("max", "how the votes of a block's sub-blocks become one score", choices=("max", "sum"))
    theta: float = _option(
        0.9, "a decode query reuses the last selection from this cosine similarity on; above 1 never", minimum=-1.0
    )
    max_reuse: int = _option(64, "decode steps that one selection may serve, its own included", minimum=1)
    positions: str = _option(
        "absolute",
        "absolute: keys keep the model's positions. compact: attended tokens are renumbered from 0, "
        "for contexts beyond the trained length",
        choices=("absolute", "compact"),
    )
    min_len: int | None = _option(
        None,
        f"requests of up to so many tokens attend to everything; if not given, {DEFAULT_MIN_LEN}, "
        "and 0 with compact positions",
        minimum=0,
    )
    cache_requests: int = _option(
        256, "requests whose decode selections are kept for reuse on a GPU; those beyond vote in every step", minimum=0
    )
    dense_layers: tuple[int, ...] = _option((), "layers that attend to everything, such as 0,1,30-31")
    vote_scale: float = _option(1.0, "factor of the logits in the vote (not in the attention)", above=0.0)

    def __post_init__(self) -> None:
        for option in fields(self):
            check_option(option.name, getattr(self, option.name))
        if self.block % self.sub_block:
            raise ConfigError("sub_block", f"a divisor of block={self.block}", self.sub_block)
        if self.is_compact and self.dense_layers:
            raise ConfigError(
                "dense_layers",
                "none with positions=compact (a dense layer has no compact positions)",
                self.dense_layers,
            )

    @property
    def window(self) -> Window:
        """Sink, budget and local window of a request, and the length up to which it attends to everything."""
        min_len = self.min_len
        if min_len is None:
            min_len = 0 if self.is_compact else DEFAULT_MIN_LEN
        return Window(num_sink=self.sink, budget=self.budget, num_local=self.local, min_len=min_len)

    @property
    def is_compact(self) -> bool:
        return self.positions == "compact"

    @classmethod
    def from_options(cls, options: TokenSelectConfig | dict[str, Any] | None) -> TokenSelectConfig:
        """From a mapping of option names, as given to `sgl.Engine(tokenselect=...)`; None gives the defaults.

        Raises:
            ConfigError: unknown option, or a value that is not allowed.
        """
        if isinstance(options, cls):
            return options
        if not isinstance(options or {}, dict):
            raise ConfigError("options", "a dict or TokenSelectConfig", options)
        known = [option.name for option in fields(cls)]
        for name in options or {}:
            if name not in known:
                raise ConfigError("option", f"one of {', '.join(known)}", name)
        values = dict(options or {})
        if "dense_layers" in values:
            values["dense_layers"] = tuple(values["dense_layers"])
        return cls(**values)

    def to_options(self) -> dict[str, Any]:
        """The inverse of `from_options`: plain builtins, safe to pickle into other processes."""
        return asdict(self)


def check_option(name: str, value: Any) -> None:
    """Raises ConfigError unless `value` has the option's type and lies in its bounds."""
    option = next(f for f in fields(TokenSelectConfig) if f.name == name)
    bounds = option.metadata
    if name == "dense_layers":
        if not all(isinstance(layer, int) and layer >= 0 for layer in value):
            raise ConfigError(name, "layer numbers from 0 on", value)
        return
    if "choices" in bounds:
        if value not in bounds["choices"]:
            raise ConfigError(name, f"one of {', '.join(bounds['choices'])}", value)
        return
    if value is None and option.default is None:
        return
    kind = int if option.default is None else type(option.default)
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not math.isfinite(value):
        raise ConfigError(name, "an integer" if kind is int else "a finite number", value)
    if "minimum" in bounds and value < bounds["minimum"]:
        raise ConfigError(name, f"at least {bounds['minimum']}", value)
    if "above" in bounds and value <= bounds["above"]:
        raise ConfigError(name, f"above {bounds['above']:g}", value)
