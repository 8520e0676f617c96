# SPDX-License-Identifier: Apache-2.0
"""Ranks of one server keep the same effort in every step, though only the first has a clock.

The schedulers here are stand-ins. Two ranks in a real server: tests/e2e/test_tensor_parallel.py. One, with both of
SGLang's loops: tests/e2e/test_effort.py.
"""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest

from sglang_tokenselect import flags, scheduler_agent
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.effort import LOWEST_LEVEL
from sglang_tokenselect.patches import effort as hooks
from sglang_tokenselect.runner import Runner
from sglang_tokenselect.scheduler_agent import SchedulerAgent

DECODE = SimpleNamespace(is_decode=lambda: True)


class Rank:
    """A scheduler's state, and what its loop calls."""

    def __init__(self, config: TokenSelectConfig, *, is_leader: bool, schedule_policy: str = "fcfs") -> None:
        server_args = SimpleNamespace(
            attention_backend="tokenselect", schedule_policy=schedule_policy, enable_priority_scheduling=False
        )
        flags.attach(server_args, config)
        self.scheduler = SimpleNamespace(
            server_args=server_args,
            metrics_collector=None,
            waiting_queue=[],
            last_batch=None,
            running_batch=SimpleNamespace(reqs=[], is_empty=lambda: not self.scheduler.running_batch.reqs),
            token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 900),
            tree_cache=SimpleNamespace(evictable_size=lambda: 50),
            max_total_num_tokens=1000,
        )
        self.runner = Runner(config)
        self.agent = SchedulerAgent(self.scheduler, self.runner, is_leader=is_leader)

    def decode(self, num_running: int) -> None:
        self.scheduler.running_batch.reqs = [object()] * num_running
        self.scheduler.last_batch = self.scheduler.running_batch
        self.agent.observe(SimpleNamespace(forward_mode=DECODE, reqs=self.scheduler.running_batch.reqs))

    def idle(self) -> None:
        self.scheduler.running_batch.reqs, self.scheduler.last_batch = [], None


def waiting(*entered: float) -> list[SimpleNamespace]:
    """A queue, by when each request entered it."""
    return [SimpleNamespace(time_stats=SimpleNamespace(wait_queue_entry_time=when)) for when in entered]


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(scheduler_agent.time, "perf_counter", lambda: now.seconds)
    monkeypatch.setattr(scheduler_agent.time, "monotonic", lambda: now.seconds)
    return now


def turn(leader: Rank, followers: list[Rank]) -> list[str]:
    """What loops begin with: the first rank receives, all get the broadcast. Returns the requests that are left."""
    received = ["request"]
    leader.agent.deliver(received)
    sent = pickle.dumps(received)
    left = []
    for rank in (leader, *followers):
        broadcast = pickle.loads(sent)
        rest = rank.agent.accept(broadcast)
        left += broadcast if rest is None else rest
    return left


def test_all_ranks_follow_the_first(clock):
    config = TokenSelectConfig(policy="slo", itl_target_ms=10.0)
    leader, follower = Rank(config, is_leader=True), Rank(config, is_leader=False)
    levels = []
    for step in range(400):
        assert turn(leader, [follower]) == ["request"] * 2
        assert leader.runner.effort == follower.runner.effort
        levels.append(leader.runner.effort.level)
        clock.seconds += 0.02 if step < 200 else 0.001
        for rank in (leader, follower):
            rank.decode(8)
    assert max(levels) == LOWEST_LEVEL and levels[0] == 0 and levels[-1] < LOWEST_LEVEL
    for rank in (leader, follower):
        rank.idle()
    turn(leader, [follower])
    assert leader.runner.effort.level == follower.runner.effort.level == 0


def test_others_than_the_first_never_look_at_a_clock(monkeypatch):
    follower = Rank(TokenSelectConfig(), is_leader=False)
    monkeypatch.setattr(scheduler_agent, "time", None)
    follower.decode(3)
    assert follower.agent.accept(["request"]) is None


def test_prefills_lie_within_the_time_between_tokens(clock):
    leader = Rank(TokenSelectConfig(policy="slo", itl_target_ms=10.0), is_leader=True)
    loads = []
    leader.agent.controller.observe = lambda load: loads.append(load)
    leader.decode(2)
    clock.seconds += 0.3
    prefill = SimpleNamespace(is_decode=lambda: False)
    leader.agent.observe(SimpleNamespace(forward_mode=prefill, reqs=[object()]))
    clock.seconds += 0.1
    leader.scheduler.waiting_queue = waiting(0.15, 0.05)
    leader.decode(3)
    assert loads[0].gap is None and loads[0].oldest_wait == 0
    assert loads[1].gap == pytest.approx(0.4) and loads[1].oldest_wait == pytest.approx(0.25)
    assert loads[1].num_running == 3
    assert loads[1].kv_usage == pytest.approx(0.05)


def test_a_sorted_queue_is_searched_for_who_has_waited_longest(clock):
    leader = Rank(TokenSelectConfig(policy="load"), is_leader=True, schedule_policy="lpm")
    loads = []
    leader.agent.controller.observe = lambda load: loads.append(load)
    clock.seconds = 1.0
    leader.scheduler.waiting_queue = waiting(0.9, 0.25, 0.0)  # the last one's time is not set yet
    leader.decode(1)
    assert loads[0].oldest_wait == pytest.approx(0.75)


def test_a_queue_that_cannot_run_is_no_rest(clock):
    leader = Rank(TokenSelectConfig(policy="load", load_requests=4), is_leader=True)
    leader.decode(4)
    turn(leader, [])
    leader.idle()
    leader.scheduler.waiting_queue = waiting(0.0)
    turn(leader, [])
    assert leader.runner.effort.level == LOWEST_LEVEL
    leader.scheduler.waiting_queue = []
    turn(leader, [])
    assert leader.runner.effort.level == 0


def test_samples_are_taken_where_somebody_looks(clock):
    assert not Rank(TokenSelectConfig(), is_leader=True).runner.samples_mass
    leader = Rank(TokenSelectConfig(min_mass=0.9, level=2), is_leader=True)
    assert leader.runner.samples_mass
    assert not Rank(TokenSelectConfig(min_mass=0.9), is_leader=False).runner.samples_mass
    turn(leader, [])
    leader.runner.masses = [(0.1, 1)] * 9  # of another level
    leader.decode(1)
    assert leader.agent.controller.mass is None
    leader.runner.masses = [(0.1, 2)] * 4
    leader.decode(1)
    turn(leader, [])
    assert leader.runner.effort.level == 1
    leader.agent.controller.configure({"min_mass": None})
    clock.seconds += 2
    turn(leader, [])
    assert not leader.runner.samples_mass


def test_other_backends_get_no_agent():
    scheduler = SimpleNamespace(server_args=SimpleNamespace(attention_backend="flashinfer"))
    hooks._add_agent(None, scheduler)
    hooks._observe(scheduler, object())
    assert hooks._accept(scheduler, ["request"]) is None
    received = ["request"]
    hooks._deliver(received, object())
    assert received == ["request"]
