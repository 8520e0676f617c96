# SPDX-License-Identifier: Apache-2.0
"""What is measured: servers, how much they reuse, and traffic, on an H200 and, as a test of the scripts, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.agents.traffic import Shape
from bench.load.setups import SMOKE, TOKENSELECT, ServedModel
from bench.serve.cells import DENSE, FLAGS, MODEL
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.effort import LOWEST_LEVEL

GROUPED = "grouped"
# Server: flags that it alone has.
SERVERS = {DENSE: (), "ungrouped": ("--tokenselect-min-group", "0"), GROUPED: ()}

# One start serves both: as configured by REUSE_FLAGS no query is similar enough, and at the cheapest level any is.
EFFORTS = {"miss": 0, "hit": LOWEST_LEVEL}
# That level doubles max_reuse, so that no answer is long enough for a second vote. Nor is one longer than the budget,
# which a selection of some steps ago fills no more once as many tokens have left the local window.
REUSE_FLAGS = ("--tokenselect-theta", "1.1", "--tokenselect-max-reuse", "256")
# A server with a control socket samples the attention mass, a dense pass each time.
NO_SAMPLES = ("--tokenselect-mass-every", "0")

DOCUMENT, TURNS = "document", "turns"


@dataclass(frozen=True)
class Workload:
    """Traffic of a shape.

    Attributes:
        together: times between tokens count only while all requests of a turn decode.
    """

    name: str
    shape: Shape
    together: bool


@dataclass(frozen=True)
class Setup(ServedModel):
    """A model and traffic for it.

    Attributes:
        budget: of the servers with TokenSelect, at any effort; their flags have it.
    """

    budget: int
    workloads: tuple[Workload, ...]


def document(system_tokens: int, new_tokens: int, answer_tokens: int, agents: Sequence[int]) -> list[Workload]:
    """One long answer to each of `agents` requests at once."""
    one = Shape(system_tokens, 1, 1, (new_tokens, new_tokens), (answer_tokens, answer_tokens))
    return [Workload(DOCUMENT, replace(one, agents=count), together=True) for count in agents]


H200 = Setup(
    described="Llama-3-8B shape, bfloat16, random weights",
    model=MODEL,
    flags=FLAGS,
    dense_backend="flashinfer",
    sparse_flags=(),
    budget=TokenSelectConfig().budget,
    workloads=(
        *document(65536, 256, 256, agents=(32, 16, 8)),
        Workload(TURNS, Shape(32768, 16, 4, (256, 1024), (64, 192), (0.5, 2.0), forks=4), together=False),
    ),
)
SMALL = Setup(
    described=SMOKE.described,
    model=SMOKE.model,
    flags=(*SMOKE.flags, "--skip-tokenizer-init"),
    dense_backend=SMOKE.dense_backend,
    sparse_flags=(*SMOKE.sparse_flags, "--tokenselect-min-shared", "0"),
    budget=128,
    workloads=(  # as few agents and tokens as share their scoring
        *document(2304, 8, 96, agents=(4,)),
        Workload(TURNS, Shape(2304, 4, 3, (8, 24), (8, 16), (0.0, 0.2), forks=1), together=False),
    ),
)


def server_flags(setup: Setup, name: str) -> tuple[str, tuple[str, ...]]:
    """The server's backend, and the flags that it has beside those of all."""
    if name == DENSE:
        return setup.dense_backend, ()
    # Cheaper levels halve the budget down to that bound.
    budget = ("--tokenselect-budget", str(setup.budget), "--tokenselect-min-budget", str(setup.budget))
    return TOKENSELECT, (*setup.sparse_flags, *budget, *REUSE_FLAGS, *NO_SAMPLES, *SERVERS[name])


def chosen(setup: Setup, names: Sequence[str], agents: Sequence[int] | None, system_tokens: int | None) -> Setup:
    """The setup's workloads of these names, if given with other numbers of agents per document and system prompts."""
    documents = [workload for workload in setup.workloads if workload.name == DOCUMENT and DOCUMENT in names]
    others = [workload for workload in setup.workloads if workload.name != DOCUMENT and workload.name in names]
    if agents and documents:
        documents = [_reshaped(documents[0], agents=count) for count in agents]
    workloads = documents + others
    if system_tokens:
        workloads = [_reshaped(workload, system_tokens=system_tokens) for workload in workloads]
    return replace(setup, workloads=tuple(workloads))


def _reshaped(workload: Workload, **changes: int) -> Workload:
    return replace(workload, shape=replace(workload.shape, **changes))
