# SPDX-License-Identifier: Apache-2.0
"""bench/agents: plans from a seed, what agents send, and the rows of their turns. No server here."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from itertools import pairwise

import pytest

from bench.agents import client, measures, run, setups, table
from bench.agents.client import Ask, Reply
from bench.agents.traffic import Histories, Shape, draw_plan
from bench.serve.client import FIRST_ID, Answer
from bench.serve.gaps import MIN_STEPS
from bench.serve.run import Report
from sglang_tokenselect.config import TokenSelectConfig, check_option
from sglang_tokenselect.ctl import KINDS
from sglang_tokenselect.effort import effort_at
from sglang_tokenselect.server_process import ServerProcess

VOCAB = 512
SHAPE = Shape(
    system_tokens=100,
    agents=4,
    turns=4,
    new_tokens=(5, 9),
    answer_tokens=(3, 6),
    think_seconds=(0.5, 2.0),
    forks=3,
)


def plan_of(shape=SHAPE, seed=1):
    return draw_plan(shape, VOCAB, seed)


def answers_of(request):
    """What a server might generate for it: unlike anything that was drawn."""
    return [1000 + request.agent] * request.answer_tokens


def played(plan):
    """The prompts of each turn by agent, and the histories at the end."""
    histories, turns = Histories(plan), []
    for requests in plan.turns:
        turns.append({request.agent: histories.prompt(request) for request in requests})
        for request in requests:
            histories.extend(request, answers_of(request))
    return turns, histories


def test_a_plan_is_its_seed():
    assert plan_of() == plan_of()
    other = plan_of(seed=2)
    assert (other.system != plan_of().system, other.turns != plan_of().turns) == (True, True)


def test_the_system_prompt_does_not_depend_on_the_agents():
    fewer = plan_of(Shape(100, 2, 1, (5, 9), (3, 6)))
    assert fewer.system == plan_of().system
    assert fewer.turns[0][0].new_ids[:5] != plan_of().turns[0][0].new_ids[:5]


def test_requests_are_within_the_shape_and_reach_its_ends():
    requests = [request for seed in range(20) for turn in plan_of(seed=seed).turns for request in turn]
    assert {len(request.new_ids) for request in requests} == {5, 6, 7, 8, 9}
    assert {request.answer_tokens for request in requests} == {3, 4, 5, 6}
    assert all(0.5 <= request.think <= 2.0 for request in requests)
    assert len({request.think for request in requests}) == len(requests)
    ids = {token for request in requests for token in request.new_ids}
    assert min(ids) >= FIRST_ID and max(ids) < VOCAB


@pytest.mark.parametrize("seed", range(8))
def test_an_agent_that_forks_ends_and_two_go_on(seed):
    turns = plan_of(seed=seed).turns
    assert [(request.agent, request.parent) for request in turns[0]] == [(i, i) for i in range(4)]
    num_forks = 0
    for before, after in pairwise(turns):
        agents, heirs = {request.agent for request in before}, Counter(request.parent for request in after)
        assert set(heirs) == agents  # nobody is lost
        forked = {parent for parent, count in heirs.items() if count == 2}
        assert max(heirs.values()) <= 2
        assert {request.agent for request in after} & agents == agents - forked  # children have numbers of their own
        assert len({request.agent for request in after}) == len(after)
        num_forks += len(forked)
    assert num_forks == SHAPE.forks


def test_more_forks_than_agents_are_refused():
    assert len(plan_of(Shape(9, 2, 2, (1, 1), (1, 1), forks=2)).turns[1]) == 4
    with pytest.raises(ValueError, match="forks: expected 0 to 2 of 2 agents, got 3"):
        Shape(9, 2, 2, (1, 1), (1, 1), forks=3)
    with pytest.raises(ValueError, match="forks: expected 0 to 0 of 2 agents, got 1"):
        Shape(9, 2, 1, (1, 1), (1, 1), forks=1)


def test_contexts_grow_by_what_was_generated_and_what_is_new():
    plan = plan_of()
    prompts, _ = played(plan)
    for request in plan.turns[0]:
        assert prompts[0][request.agent] == (*plan.system, *request.new_ids)
    for number in range(1, len(plan.turns)):
        before = {request.agent: request for request in plan.turns[number - 1]}
        for request in plan.turns[number]:
            history = (*prompts[number - 1][request.parent], *answers_of(before[request.parent]))
            assert prompts[number][request.agent] == (*history, *request.new_ids)


def test_children_share_the_history_of_their_parent_and_no_more():
    plan = plan_of()
    prompts, histories = played(plan)
    forks = 0
    for number, requests in enumerate(plan.turns[1:], start=1):
        by_parent = {}
        for request in requests:
            by_parent.setdefault(request.parent, []).append(request)
        for first, second in (children for children in by_parent.values() if len(children) == 2):
            parent = histories._ids[first.parent]
            assert prompts[number][first.agent][: len(parent)] == prompts[number][second.agent][: len(parent)] == parent
            assert first.new_ids != second.new_ids
            forks += 1
    assert forks == SHAPE.forks


def test_an_agent_whose_request_failed_stays_where_it_was():
    plan = plan_of()
    histories = Histories(plan)
    for request in plan.turns[0]:
        histories.skip(request)
    children = [request for request in plan.turns[1] if request.agent != request.parent]
    for request in plan.turns[1]:
        assert histories.prompt(request) == (*plan.system, *request.new_ids)
        histories.skip(request)
    for child in children:
        assert histories._ids[child.agent] == plan.system


class FakeServer:
    """Generates `last id + 1, + 2, ...`, one token a chunk, and remembers prefixes as a radix cache does."""

    url = "http://nowhere"

    def __init__(self, refused=()):
        self.refused, self.posted, self.prompts, self.level = refused, [], [], 0
        self._seen, self._readings = [], 0

    async def stream(self, url, body):
        assert url == self.url
        asked = json.loads(body)
        ids, count = asked["input_ids"], asked["sampling_params"]["max_new_tokens"]
        if len(self.prompts) in self.refused:
            self.prompts.append(ids)
            raise RuntimeError("the server\nanswered 400")
        self.prompts.append(ids)
        cached = max((common(ids, seen) for seen in self._seen), default=0)
        cached = min(cached, len(ids) - 1)
        out = [ids[-1] + i + 1 for i in range(count)]
        self._seen.append([*ids, *out[:-1]])  # the last token's key is never computed
        meta = {"prompt_tokens": len(ids), "cached_tokens": cached}
        events = [{"output_ids": out[: i + 1], "meta_info": {**meta, "completion_tokens": i + 1}} for i in range(count)]
        sent = asyncio.get_running_loop().time()
        return sent, [(sent + 0.25 + 0.01 * i, b"data: " + json.dumps(e).encode()) for i, e in enumerate(events)]

    flush = ServerProcess.flush

    def post_text(self, path, payload):
        self.posted.append(path)
        self._seen.clear()

    def counters(self):
        self._readings += 1
        counted = {"votes": 1, "reuses": 3, "attended_tokens": 1, "cached_tokens": 4, "decode_queries": 2}
        return {name: count * self._readings for name, count in {**counted, "shared_queries": 1}.items()}

    def report(self):
        return {"effort": {"level": self.level}}


def common(first, second):
    same = (a == b for a, b in zip(first, second, strict=False))
    return next((i for i, is_same in enumerate(same) if not is_same), min(len(first), len(second)))


@pytest.fixture
def server(monkeypatch):
    server = FakeServer()
    monkeypatch.setattr(client, "stream", server.stream)
    return server


def test_replies_have_what_was_generated_and_what_was_cached(server):
    first = client.ask_turn(server.url, [Ask(0.0, [5, 6, 7], 4)], limit=1.0)
    second = client.ask_turn(server.url, [Ask(0.0, [5, 6, 7, 8, 9, 10, 11], 1)], limit=1.0)
    assert [(reply.ids, reply.prompt_tokens, reply.cached_tokens) for reply in (*first, *second)] == [
        ((8, 9, 10, 11), 3, 0),
        ((12,), 7, 6),
    ]
    assert first[0].answer.tokens == (1, 2, 3, 4)
    assert first[0].answer.ttft == pytest.approx(0.25)


def test_agents_send_when_they_have_thought(server):
    thought = [0.1, 0.0, 0.05]
    replies = client.ask_turn(server.url, [Ask(think, [7 + i], 1) for i, think in enumerate(thought)], limit=1.0)
    assert server.prompts == [[8], [9], [7]]
    assert [reply.ids for reply in replies] == [(8,), (9,), (10,)]  # in the order of the asks
    sent = [reply.answer.sent for reply in replies]
    assert sent[0] - sent[1] > 0.08


def test_a_request_that_fails_leaves_the_others(server, monkeypatch):
    server.refused = {0}
    failed, reply = client.ask_turn(server.url, [Ask(0.0, [5], 2), Ask(0.05, [6], 2)], limit=1.0)
    assert (str(failed), reply.ids) == ("the server\nanswered 400", (7, 8))

    async def too_few(url, body):
        sent, chunks = await server.stream(url, body)
        return sent, chunks[:-1]

    monkeypatch.setattr(client, "stream", too_few)
    [failed] = client.ask_turn(server.url, [Ask(0.0, [5], 2)], limit=1.0)
    assert "expected 1 tokens in and 2 out" in str(failed)


def test_an_answer_that_takes_too_long_is_given_up(monkeypatch):
    async def hang(url, body):
        await asyncio.sleep(2.0)
        return 0.0, []

    monkeypatch.setattr(client, "stream", hang)
    [failed] = client.ask_turn("http://nowhere", [Ask(0.0, [5], 2)], limit=0.05)
    assert str(failed) == "no answer within 0.05 s"


def reply(sent, arrivals, tokens=None, prompt_tokens=100, cached_tokens=0):
    tokens = tokens or tuple(range(1, len(arrivals) + 1))
    return Reply(Answer(sent, tuple(arrivals), tokens), (7,) * tokens[-1], prompt_tokens, cached_tokens)


def test_columns_of_a_turn():
    # Gaps of 10, 10 and 40 ms; 20 ms; and two tokens in one chunk of 60 ms.
    replies = [
        reply(1.0, (1.5, 1.51, 1.52, 1.56), cached_tokens=90),
        reply(2.0, (2.1, 2.12), prompt_tokens=300, cached_tokens=150),
        reply(2.5, (2.8, 2.86), tokens=(1, 3)),
    ]
    assert measures.turn_row(replies, together=False) == {
        "requests": 3,
        "failed": 0,
        "prompt_tokens": 500,
        "seconds": 1.86,
        "ttft_p50_s": 0.3,
        "ttft_p20_s": 0.18,
        "ttft_p80_s": 0.42,
        "itl_p50_ms": 25.0,
        "itl_p20_ms": 10.0,
        "itl_p80_ms": 30.0,
        "output_tokens_per_s": round(9 / 1.86, 2),
        "decode_tokens_per_s": "",
        "radix_hit_ratio": 0.48,
        "note": "1 of 5 chunks with several tokens",
    }


def test_gaps_of_a_document_count_only_while_all_decode():
    early = reply(0.0, (0.0, 9.0, *(10.0 + i for i in range(60))))
    late = reply(0.0, [10.0 + 0.5 * i for i in range(90)])
    row = measures.turn_row([early, late], together=True)
    assert (row["itl_p50_ms"], row["itl_p20_ms"], row["itl_p80_ms"]) == (500.0, 500.0, 1000.0)
    steps = {1.0: 44, 0.5: 89}  # from 10.0 to 54.5
    mean = sum(gap * count for gap, count in steps.items()) / sum(steps.values())
    assert row["decode_tokens_per_s"] == round(2 / mean, 2)
    with pytest.raises(ValueError, match=f"expected at least {MIN_STEPS}"):
        measures.turn_row([early, reply(0.0, (10.0, 11.0))], together=True)


def test_merged_chunks_of_a_document_are_noted():
    row = measures.turn_row([reply(0.0, range(40), tokens=tuple(range(1, 81, 2)))], together=True)
    assert (row["itl_p50_ms"], row["note"]) == (500.0, "39 of 39 chunks with several tokens")


def test_one_token_has_no_gap():
    row = measures.turn_row([reply(1.0, (1.25,), prompt_tokens=300)], together=False)
    assert (row["ttft_p50_s"], row["ttft_p20_s"], row["ttft_p80_s"]) == (0.25, 0.25, 0.25)
    assert "itl_p50_ms" not in row


def test_requests_that_failed_are_counted_and_noted():
    row = measures.turn_row([reply(0.0, (1.0, 2.0)), RuntimeError("broken\npipe")], together=False)
    assert (row["requests"], row["failed"], row["note"]) == (2, 1, "1 requests failed: broken pipe")
    assert row["prompt_tokens"] == 100
    with pytest.raises(RuntimeError, match="all 1 requests failed: refused"):
        measures.turn_row([RuntimeError("refused")], together=False)


BEFORE = {"votes": 5, "reuses": 5, "attended_tokens": 0, "cached_tokens": 0, "decode_queries": 10, "shared_queries": 4}
AFTER = {
    "votes": 30,
    "reuses": 80,
    "attended_tokens": 3,
    "cached_tokens": 12,
    "decode_queries": 30,
    "shared_queries": 19,
}


def test_ratios_are_of_what_was_counted_in_the_turn():
    row = measures.counted_row(BEFORE, AFTER)
    assert (row["votes"], row["reuses"], row["hit_ratio"], row["attended_share"]) == (25, 75, 0.75, 0.25)
    assert (row["decode_queries"], row["shared_ratio"]) == (20, 0.75)
    idle = measures.counted_row(AFTER, AFTER)
    assert (idle["hit_ratio"], idle["shared_ratio"]) == ("", "")
    assert measures.counted_row({}, {}) == {}


def test_every_column_has_its_place():
    row = {**measures.turn_row([reply(0.0, (1.0, 2.0))], False), **measures.counted_row(BEFORE, AFTER)}
    assert set(row) <= set(measures.COLUMNS)
    assert set(measures.COLUMNS) <= set(row)


@pytest.fixture
def rows_of(server, tmp_path, capsys):
    """Measures a workload against the fake server and returns its rows."""

    def measure(shape, steered):
        setup = setups.Setup("", {"vocab_size": VOCAB}, (), "", (), 48, ())
        report = Report(tmp_path / "out.csv", {}, measures.COLUMNS)
        workload = setups.Workload("turns", shape, together=False)
        run.measure_workload({"server": "x", "effort": ""}, steered, setup, workload, 1.0, report)
        capsys.readouterr()
        return report._rows

    return measure


QUIET = Shape(100, 2, 3, (5, 5), (4, 4), forks=1)


def test_agents_send_their_history_and_hit_the_radix_cache(server, rows_of):
    rows = rows_of(QUIET, run.Steered(server, "ipc:///control"))
    assert server.posted == ["/flush_cache?timeout=60"]
    assert [(row["turn"], row["agents"], row["requests"]) for row in rows] == [
        (0, 2, 1),
        (1, 2, 2),
        (2, 2, 2),
        (3, 2, 3),
    ]
    assert [row["prompt_tokens"] // row["requests"] for row in rows] == [100, 105, 114, 123]
    # All but the new tokens and the last generated one, whose key nobody computed but, in a fork, the other child.
    ratios = [0.0, 100 / 105, 108 / 114, (3 * 117 + 1) / (3 * 123)]
    assert [row["radix_hit_ratio"] for row in rows] == [round(ratio, 4) for ratio in ratios]
    assert [row["hit_ratio"] for row in rows] == ["", 0.75, 0.75, 0.75]
    assert [row["shared_ratio"] for row in rows] == ["", 0.5, 0.5, 0.5]


def test_a_dense_server_has_no_counters(server, rows_of):
    rows = rows_of(QUIET, run.Steered(server, None))
    assert [row["hit_ratio"] for row in rows] == [""] * 4
    assert server._readings == 0


def test_a_failed_request_is_left_out_of_its_agents_history(server, rows_of):
    server.refused = {1}  # after the system prompt, the first of two agents
    rows = rows_of(Shape(100, 2, 2, (5, 5), (4, 4)), run.Steered(server, None))
    assert [row["failed"] for row in rows] == [0, 1, 0]
    assert [len(ids) for ids in server.prompts] == [100, 105, 105, 105, 114]


def test_a_child_whose_request_failed_goes_on_from_its_parents_history(server, rows_of):
    server.refused = {6}  # the first child of a fork in the second turn
    rows_of(Shape(100, 3, 3, (5, 5), (4, 4), forks=1), run.Steered(server, None))
    assert [len(ids) for ids in server.prompts] == [100, *[105] * 3, *[114] * 4, 123, 123, 114, 123]


def test_a_level_that_is_not_set_is_an_error(server, monkeypatch):
    asked = []

    def answer(request, endpoint, *, as_json, timeout):
        asked.append((request, endpoint))
        server.level = request["options"]["level"]
        return 0

    monkeypatch.setattr(run, "run_ctl", answer)
    run.Steered(server, "ipc:///control").set_level(4)
    assert asked == [({"command": "set", "options": {"level": 4}}, "ipc:///control")]
    monkeypatch.setattr(run, "STEER_SECONDS", 0.1)
    monkeypatch.setattr(run, "run_ctl", lambda *_, **__: 0)
    with pytest.raises(RuntimeError, match="level: expected 0 after 0.1 s, got 4"):
        run.Steered(server, "ipc:///control").set_level(0)
    monkeypatch.setattr(run, "run_ctl", lambda *_, **__: 1)
    with pytest.raises(RuntimeError, match="the server refused level 4"):
        run.Steered(server, "ipc:///control").set_level(4)


def config_of(flags):
    """Of flags that come in pairs."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    names = {flag.removeprefix("--tokenselect-").replace("-", "_"): value for flag, value in pairs}
    options = {name: KINDS[name](value) for name, value in names.items()}
    for name, value in options.items():
        check_option(name, value)
    return TokenSelectConfig(**options)


@pytest.mark.parametrize("setup", [setups.H200, setups.SMALL], ids=["H200", "small"])
def test_efforts_are_the_two_ends_of_reuse_at_one_budget(setup):
    backend, flags = setups.server_flags(setup, setups.GROUPED)
    config = config_of(flags)
    miss, hit = (effort_at(config, setups.EFFORTS[name]) for name in ("miss", "hit"))
    assert (backend, miss.theta > 1.0, hit.theta) == ("tokenselect", True, -1.0)
    assert miss.budget == hit.budget == config.budget == setup.budget
    longest = max(workload.shape.answer_tokens[1] for workload in setup.workloads)
    assert min(hit.max_reuse, hit.budget) >= longest
    assert config.mass_every == 0
    # Where every prompt is longer than min_len, the cheapest level's lack of one makes no difference.
    assert all(workload.shape.system_tokens > config.window.dense_len for workload in setup.workloads)


def test_servers_differ_in_what_they_share():
    assert setups.server_flags(setups.H200, "dense") == ("flashinfer", ())
    _, ungrouped = setups.server_flags(setups.H200, "ungrouped")
    assert ungrouped == (*setups.server_flags(setups.H200, setups.GROUPED)[1], "--tokenselect-min-group", "0")
    assert "--skip-tokenizer-init" in setups.H200.flags and "--skip-tokenizer-init" in setups.SMALL.flags


def test_graphs_hold_all_agents():
    flags = dict(zip(setups.H200.flags, [*setups.H200.flags[1:], ""], strict=True))
    shapes = [workload.shape for workload in setups.H200.workloads]
    assert max(shape.agents + shape.forks for shape in shapes) <= int(flags["--cuda-graph-max-bs-decode"])


def test_options_choose_the_workloads():
    def shapes(*arguments):
        options = run.parse_options(["out.csv", *arguments])
        chosen = setups.chosen(setups.H200, options.workloads, options.agents, options.system_tokens)
        return [(workload.name, workload.shape.agents, workload.shape.system_tokens) for workload in chosen.workloads]

    everything = [("document", 32, 65536), ("document", 16, 65536), ("document", 8, 65536), ("turns", 16, 32768)]
    assert shapes() == everything
    assert shapes("--workloads", "document") == everything[:3]
    assert shapes("--workloads", "turns", "--agents", "4") == everything[3:]
    assert shapes("--agents", "4", "24", "--system-tokens", "8192") == [
        ("document", 4, 8192),
        ("document", 24, 8192),
        ("turns", 16, 8192),
    ]


def test_the_table_has_a_line_for_each_turn_and_server(tmp_path, capsys):
    report = Report(tmp_path / "out.csv", {"gpu": "none"}, measures.COLUMNS)
    turn = measures.turn_row([reply(0.0, [0.5 + 0.01 * i for i in range(40)], cached_tokens=98)], together=True)
    turn |= {"itl_p20_ms": 9.0, "itl_p80_ms": 12.0, "ttft_p20_s": 0.25, "ttft_p80_s": 0.75}
    counted = measures.counted_row(BEFORE, AFTER)

    def fail():
        raise RuntimeError("no server")

    for server, effort, agents, measure in (
        ("grouped", "hit", 8, lambda: {**turn, **counted, "failed": 2}),
        ("grouped", "miss", 8, fail),
        ("dense", "", 8, lambda: turn),
        ("dense", "", 16, lambda: measures.turn_row([reply(0.0, (0.25,))], together=False)),
    ):
        report.add({"server": server, "effort": effort, "workload": "document", "agents": agents, "turn": 1}, measure)
    capsys.readouterr()
    _, rows = table.read_csvs([tmp_path / "out.csv"])
    assert table.table(rows).splitlines() == [
        "| workload | agents | turn | server | requests | ITL, ms | TTFT, s | output tokens/s | while all decode "
        "| radix hits | selection hits | shared |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        "| document | 8 | 1 | dense | 1 | 10.0 (9.0 to 12.0) | 0.50 (0.25 to 0.75) | 45 | 100 | 0.98 |  |  |",
        "| document | 8 | 1 | grouped miss | failed |  |  |  |  |  |  |  |",
        "| document | 8 | 1 | grouped hit | 1, 2 failed | 10.0 (9.0 to 12.0) | 0.50 (0.25 to 0.75) | 45 | 100 "
        "| 0.98 | 0.75 | 0.75 |",
        "| document | 16 | 1 | dense | 1 |  | 0.25 (0.25 to 0.25) | 4 |  | 0.00 |  |  |",
    ]
