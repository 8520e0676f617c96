# SPDX-License-Identifier: Apache-2.0
"""Traffic of agents, drawn from a seed: who asks when, with how many new tokens, and who forks. Pure, no server.

All agents share a system prompt. In each turn an agent thinks, sends its history and new tokens of a user or a tool,
and gets an answer; prompt and answer are its history in the next turn. An agent that forks ends, and two new ones
continue its history, each by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.serve.client import FIRST_ID

Range = tuple[float, float]  # lowest and highest, of numbers drawn uniformly


@dataclass(frozen=True)
class Shape:
    """How much traffic. Lengths are in tokens; ranges include both ends.

    Attributes:
        system_tokens: of the system prompt that all agents share.
        agents: in the first turn.
        new_tokens: of a user or a tool, in each turn.
        answer_tokens: in each turn.
        think_seconds: between the end of a turn, or the first's begin, and the agent's request.
        forks: in all turns but the first together.
    """

    system_tokens: int
    agents: int
    turns: int
    new_tokens: tuple[int, int]
    answer_tokens: tuple[int, int]
    think_seconds: Range = (0.0, 0.0)
    forks: int = 0

    def __post_init__(self) -> None:
        # As many agents as forks at any turn, for no agent forks twice in one.
        most = self.agents if self.turns > 1 else 0
        if not 0 <= self.forks <= most:
            raise ValueError(f"forks: expected 0 to {most} of {self.agents} agents, got {self.forks}")


@dataclass(frozen=True)
class Request:
    """One agent's part of one turn.

    Attributes:
        agent: its number.
        parent: the agent whose history it continues: itself, or the one that forked.
        think: seconds from the turn's begin to sending.
        new_ids: of a user or a tool.
        answer_tokens: that it asks for.
    """

    agent: int
    parent: int
    think: float
    new_ids: tuple[int, ...]
    answer_tokens: int


@dataclass(frozen=True)
class Plan:
    """All traffic but the answers.

    Attributes:
        system: ids of the shared system prompt.
        turns: the requests of each turn.
    """

    system: tuple[int, ...]
    turns: tuple[tuple[Request, ...], ...]


class Histories:
    """What each agent has read and written so far, the system prompt included."""

    def __init__(self, plan: Plan) -> None:
        self._ids = {request.parent: plan.system for request in plan.turns[0]}

    def prompt(self, request: Request) -> tuple[int, ...]:
        return (*self._ids[request.parent], *request.new_ids)

    def extend(self, request: Request, answer: Sequence[int]) -> None:
        """With the ids that the server generated."""
        self._ids[request.agent] = (*self.prompt(request), *answer)

    def skip(self, request: Request) -> None:
        """The request failed: its agent stays where it was."""
        self._ids[request.agent] = self._ids[request.parent]


def draw_plan(shape: Shape, vocab_size: int, seed: int) -> Plan:
    """The same plan for the same arguments; the same system prompt for the same length and seed."""
    system = _draw_ids(np.random.default_rng(seed), shape.system_tokens, vocab_size)
    rng = np.random.default_rng((seed, shape.agents, shape.turns))
    forks = np.bincount(rng.integers(1, shape.turns, shape.forks), minlength=shape.turns)
    agents, turns = list(range(shape.agents)), []
    num_agents = shape.agents  # so far, those that have ended included
    for num_forks in forks:
        forking = set(rng.choice(agents, num_forks, replace=False).tolist())
        parents = [(agent, agent) for agent in agents if agent not in forking]
        children = sorted([*forking, *forking])
        parents += [(num_agents + i, parent) for i, parent in enumerate(children)]
        num_agents += len(children)
        agents = [agent for agent, _ in parents]
        turns.append(tuple(_draw_request(shape, vocab_size, rng, *of) for of in parents))
    return Plan(system, tuple(turns))


def _draw_request(shape: Shape, vocab_size: int, rng: np.random.Generator, agent: int, parent: int) -> Request:
    num_new, num_answered = (
        int(rng.integers(*lengths, endpoint=True)) for lengths in (shape.new_tokens, shape.answer_tokens)
    )
    think = float(rng.uniform(*shape.think_seconds))
    return Request(agent, parent, think, _draw_ids(rng, num_new, vocab_size), num_answered)


def _draw_ids(rng: np.random.Generator, count: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.integers(FIRST_ID, vocab_size, count).tolist())
