# SPDX-License-Identifier: Apache-2.0
"""The configuration: every option, its default, its bounds and its help text, written once.

Flags (flags.py), the README's table (tests/unit/test_docs.py) and `sgl.Engine` read them from here.
"""

from __future__ import annotations

from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any

from sglang_tokenselect.effort import LOWEST_LEVEL, MOST_REUSE
from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.selectors import SELECTORS, Selector


class ConfigError(ValueError):
    """An unknown or impossible setting, told as name, expected, got."""

    def __init__(self, name: str, expected: str, got: object) -> None:
        super().__init__(f"tokenselect {name}: expected {expected}, got {got!r}")


DEFAULT_MIN_LEN = 20480
"""Beyond, reuse was faster than dense attention for any number of requests (README, "Speed")."""

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


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
    selector: str = _option(
        "vote",
        "who is chosen. " + "; ".join(f"{name}: {selector.summary}" for name, selector in SELECTORS.items()),
        choices=tuple(SELECTORS),
    )
    theta: float = _option(
        0.9, "a decode query reuses the last selection from this cosine similarity on; above 1 never", minimum=-1.0
    )
    max_reuse: int = _option(
        64, "decode steps that one selection may serve, its own included", minimum=1, maximum=MOST_REUSE
    )
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
    min_group: int = _option(
        4,
        "requests that share a long prefix and are at least so many have it scored once for all; 0 never",
        minimum=0,
    )
    min_shared: int = _option(
        65536,
        "tokens that this must save, of each shared part as many as it has, times its requests less two; below, each "
        "request scores its prefix by itself",
        minimum=0,
    )
    vote: str = _option(
        "global",
        "with --tp: whose heads choose. global: those of all ranks together, the same tokens as on one GPU; local: "
        "each rank's own, so that ranks exchange nothing",
        choices=("global", "local"),
    )
    dense_layers: tuple[int, ...] = _option((), "layers that attend to everything, such as 0,1,30-31")
    vote_scale: float = _option(1.0, "factor of the logits in the vote (not in the attention)", above=0.0)
    max_budget: int | None = _option(
        None, "largest budget that a request may ask for and the quality guard may raise to; if not given, the budget"
    )
    min_budget: int = _option(0, "smallest budget that a policy may choose", minimum=0)
    policy: str = _option(
        "fixed",
        "who sets the effort level of decode. fixed: --tokenselect-level. load: running requests, the first one's wait "
        "in the queue, and the KV cache's usage. slo: the time between tokens, held at --tokenselect-itl-target-ms",
        choices=("fixed", "load", "slo"),
    )
    level: int = _option(
        0, f"effort level of policy fixed: 0, as configured, to {LOWEST_LEVEL}, the cheapest", minimum=0
    )
    itl_target_ms: float | None = _option(None, "policy slo: median milliseconds between tokens to hold", above=0.0)
    load_requests: int = _option(32, "policy load: running requests at which the cheapest level is reached", minimum=1)
    load_wait_ms: float = _option(
        2000.0, "policy load: milliseconds that a request has waited when the cheapest level is reached", above=0.0
    )
    min_mass: float | None = _option(
        None,
        "quality guard: share of the candidates' attention that the chosen tokens must hold; below it, policies choose "
        "more effort",
        above=0.0,
        maximum=1.0,
    )
    mass_every: int = _option(128, "decode steps between two samples of that share; 0 never", minimum=0)
    publish: str | None = _option(
        None, "ZMQ endpoint to publish telemetry on, such as tcp://127.0.0.1:30100 or ipc:///tmp/tokenselect"
    )
    control: str | None = _option(None, "ZMQ endpoint to take commands of `sglang-tokenselect ctl` on")
    allow_remote: bool = _option(False, "the two endpoints may be reached from other machines; nothing protects them")
    record: str | None = _option(
        None,
        "folder to write to what each decode query attends to, and what that keeps of its attention; slow, for "
        "`sglang-tokenselect trace` and `fidelity`; on a GPU without decode CUDA graphs",
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            check_option(option.name, getattr(self, option.name))
        if self.block % self.sub_block:
            raise ConfigError("sub_block", f"a divisor of block={self.block}", self.sub_block)
        if self.min_group == 1:
            raise ConfigError("min_group", "0 or at least 2", 1)
        if self.is_compact and self.dense_layers:
            raise ConfigError(
                "dense_layers",
                "none with positions=compact (a dense layer has no compact positions)",
                self.dense_layers,
            )
        self._check_effort()

    def _check_effort(self) -> None:
        if self.min_budget > self.budget:
            raise ConfigError("min_budget", f"at most budget={self.budget}", self.min_budget)
        if self.largest_budget < self.budget:
            raise ConfigError("max_budget", f"at least budget={self.budget}", self.max_budget)
        if self.level > LOWEST_LEVEL:
            raise ConfigError("level", f"at most {LOWEST_LEVEL}", self.level)
        if self.policy == "slo" and self.itl_target_ms is None:
            raise ConfigError("itl_target_ms", "a number with policy=slo", None)
        if self.min_mass is not None and self.mass_every == 0:
            raise ConfigError("mass_every", "at least 1 with min_mass", 0)
        for name in ("publish", "control"):
            check_endpoint(name, getattr(self, name), allow_remote=self.allow_remote)

    @property
    def largest_budget(self) -> int:
        return self.budget if self.max_budget is None else self.max_budget

    @property
    def window(self) -> Window:
        """Sink, budget and local window of a request, and the length up to which it attends to everything."""
        min_len = self.min_len
        if min_len is None:
            min_len = 0 if self.is_compact else DEFAULT_MIN_LEN
        return Window(num_sink=self.sink, budget=self.budget, num_local=self.local, min_len=min_len)

    @property
    def selects_by(self) -> Selector:
        return SELECTORS[self.selector]

    @property
    def queries_per_vote(self) -> int:
        """Queries of a prefill whose mean casts one row of votes."""
        return self.block if self.selects_by.votes_once else self.sub_block

    def voting_ranks(self, tp_size: int) -> int:
        """Ranks that choose together."""
        return tp_size if self.vote == "global" else 1

    @property
    def is_compact(self) -> bool:
        return self.positions == "compact"

    @classmethod
    def from_options(cls, options: TokenSelectConfig | dict[str, Any] | None) -> TokenSelectConfig:
        """From a mapping of option names, as given to `sgl.Engine(tokenselect=...)`; None gives the defaults.

        Raises:
            ConfigError: unknown option, or a value that is not allowed.
        """
        if isinstance(options, TokenSelectConfig):
            return options
        options = {} if options is None else options
        if not isinstance(options, dict):
            raise ConfigError("options", "a dict or TokenSelectConfig", options)
        known = [option.name for option in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError("option", f"one of {', '.join(known)}", name)
        values = dict(options)
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
    kind = option_kind(option)
    if kind in (bool, str):
        if not isinstance(value, kind):
            raise ConfigError(name, "true or false" if kind is bool else "a string", value)
        return
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)) or not abs(value) < 2**63:
        raise ConfigError(name, "an integer" if kind is int else "a finite number", value)
    if "minimum" in bounds and value < bounds["minimum"]:
        raise ConfigError(name, f"at least {bounds['minimum']}", value)
    if "above" in bounds and value <= bounds["above"]:
        raise ConfigError(name, f"above {bounds['above']:g}", value)
    if "maximum" in bounds and value > bounds["maximum"]:
        raise ConfigError(name, f"at most {bounds['maximum']}", value)


def option_kind(option: Field) -> type:
    """int, float, str, bool or tuple: the type of an option's values, None aside."""
    return next(kind for kind in (int, float, str, bool, tuple) if option.type.startswith(kind.__name__))


def check_endpoint(name: str, endpoint: str | None, *, allow_remote: bool) -> None:
    """Raises ConfigError unless `endpoint` is None, ipc:///PATH, or tcp://HOST:PORT with a host of this machine."""
    if endpoint is None:
        return
    scheme, _, address = endpoint.partition("://")
    host, _, port = address.rpartition(":")
    if scheme == "ipc" and address.startswith("/"):
        return
    if scheme != "tcp" or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(name, "tcp://HOST:PORT or ipc:///PATH", endpoint)
    if not (allow_remote or host in LOOPBACK):
        raise ConfigError(name, f"a host of {', '.join(LOOPBACK)}, or allow_remote", endpoint)
