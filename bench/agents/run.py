# SPDX-License-Identifier: Apache-2.0
"""Agents that share a long system prompt, against real servers: dense, TokenSelect with each request scored by itself
(ungrouped), and TokenSelect with the shared part scored once for all that share it (grouped).

    python bench/agents/run.py OUT.csv [--servers dense ungrouped grouped] [--efforts miss hit]
    python bench/agents/run.py OUT.csv --workloads document --agents 4 24 --system-tokens 131072
    python bench/agents/run.py OUT.csv --small

A Llama-3-8B shape with random weights, ids drawn from one seed: all servers get the same system prompts, new tokens,
forks and times to think. What an agent sends is its history, with the answers that this server gave, and new tokens.

Workloads. `document`: 32, 16 and 8 agents, each asks once about one document of 65,536 tokens with 256 tokens of its
own, all at once, for 256 tokens. `turns`: 16 agents over a system prompt of 32,768 tokens, 4 turns of 256 to 1,024 new
tokens and answers of 64 to 192 after 0.5 to 2 s of thinking, and 4 forks on the way.

Efforts, of the servers with TokenSelect: in `miss` every query votes; in `hit` any query reuses an earlier selection.
One server measures both, told by its control socket; the budget is the same. With random weights nothing between the
two can be measured: no query is similar to the one before.

A row is a turn. Turn 0 is the system prompt alone, read by one request that generates one token; the radix cache was
emptied before. Then all agents begin each turn together, once the last answer of the turn before is complete, and
think from there: so what the server counted meanwhile is the turn's.

Columns. TTFT: from sending to the first token. ITL: between consecutive tokens at the client, a chunk of n tokens as n
equal times; in `document` only while all agents decode, in `turns` of whole answers, prefills of other agents included.
Median, 20th and 80th percentile. output_tokens_per_s: over `seconds`, from the turn's first request to its last token.
decode_tokens_per_s, in `document`: while all agents decode, which is their number by the mean time between tokens.
radix_hit_ratio: prompt tokens that came from the radix cache. hit_ratio: reuses of votes and reuses, summed over
requests, steps and layers. shared_ratio: decode queries that shared their scoring with others. attended_share: attended
of cached tokens. The last three are of the turn's decode steps.

The file is written after each turn. A turn without numbers says in its note why, so does one in which requests failed;
an agent whose request failed goes on from where it was. --small does the same with a tiny model and few tokens on the
CPU: it tests these scripts and measures nothing.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, this file sees its own folder only

from bench.agents.client import Ask, Reply, ask_turn
from bench.agents.measures import COLUMNS, Row, counted_row, turn_row
from bench.agents.setups import DOCUMENT, EFFORTS, H200, SERVERS, SMALL, TURNS, Setup, Workload, chosen, server_flags
from bench.agents.traffic import Histories, Plan, Request, draw_plan
from bench.load.run import where
from bench.load.setups import TOKENSELECT
from bench.serve.cells import write_model
from bench.serve.run import PAUSE, WARM_UP_TOKENS, Report, measure_each
from sglang_tokenselect.ctl import run_ctl
from sglang_tokenselect.server_process import ServerProcess

SEED, WARM_UP_SEED = 1, 2
STEER_SECONDS = 10.0


class Steered:
    """A server whose effort is set from outside.

    Args:
        control: the endpoint of its control socket; None of a dense server.
    """

    def __init__(self, server: ServerProcess, control: str | None) -> None:
        self.server, self._control = server, control

    @property
    def is_sparse(self) -> bool:
        return self._control is not None

    def counters(self) -> dict[str, int]:
        return self.server.counters() if self.is_sparse else {}

    def set_level(self, level: int) -> None:
        """Returns once it is in force. Idle servers only: a busy one follows with its next step.

        Raises:
            RuntimeError: the server refused, or did not follow.
        """
        request = {"command": "set", "options": {"level": level}}
        with redirect_stdout(io.StringIO()):  # where it prints all options; why it fails goes to stderr
            exit_code = run_ctl(request, self._control, as_json=False, timeout=STEER_SECONDS)
        if exit_code:
            raise RuntimeError(f"the server refused level {level}")
        deadline = time.monotonic() + STEER_SECONDS
        while (found := self._level()) != level:
            if time.monotonic() > deadline:
                raise RuntimeError(f"level: expected {level} after {STEER_SECONDS:g} s, got {found}")
            time.sleep(0.05)

    def _level(self) -> int:
        return self.server.report()["effort"]["level"]


class Traffic:
    """One workload against one server, turn by turn.

    Args:
        limit: seconds for one answer.
    """

    def __init__(self, steered: Steered, plan: Plan, together: bool, limit: float) -> None:
        self._steered, self._together, self._limit = steered, together, limit
        self._plan, self._histories = plan, Histories(plan)

    def read_system(self) -> Row:
        """Turn 0."""
        self._steered.server.flush()
        return turn_row(self._ask([Ask(0.0, self._plan.system, 1)]), together=False)

    def turn(self, requests: Sequence[Request]) -> Row:
        before = self._steered.counters()
        asks = [Ask(request.think, self._histories.prompt(request), request.answer_tokens) for request in requests]
        outcomes = self._ask(asks)
        time.sleep(PAUSE)  # the step in flight is this turn's, and the next one finds the answers in the radix cache
        after = self._steered.counters()
        for request, outcome in zip(requests, outcomes, strict=True):
            if isinstance(outcome, Reply):
                self._histories.extend(request, outcome.ids)
            else:
                self._histories.skip(request)
        return {**turn_row(outcomes, self._together), **counted_row(before, after)}

    def _ask(self, asks: Sequence[Ask]) -> list[Reply | Exception]:
        return ask_turn(self._steered.server.url, asks, self._limit)


def warm_up(steered: Steered, setup: Setup, limit: float) -> None:
    """Compiles what is compiled at first use: the first workload's first turn, with other ids and short answers."""
    shape = replace(setup.workloads[0].shape, turns=1, forks=0, answer_tokens=(WARM_UP_TOKENS, WARM_UP_TOKENS))
    plan = draw_plan(shape, setup.model["vocab_size"], WARM_UP_SEED)
    traffic = Traffic(steered, plan, together=False, limit=limit)
    traffic.read_system()
    traffic.turn(plan.turns[0])


def measure_workload(
    cell: Row, steered: Steered, setup: Setup, workload: Workload, limit: float, report: Report
) -> None:
    plan = draw_plan(workload.shape, setup.model["vocab_size"], SEED)
    traffic = Traffic(steered, plan, workload.together, limit)
    cell = {**cell, "workload": workload.name, "agents": workload.shape.agents}
    report.add({**cell, "turn": 0}, traffic.read_system)
    for number, requests in enumerate(plan.turns, start=1):
        report.add({**cell, "turn": number}, lambda requests=requests: traffic.turn(requests))


def measure_server(name: str, folder: Path, setup: Setup, options: argparse.Namespace, report: Report) -> None:
    backend, flags = server_flags(setup, name)
    control = f"ipc://{folder}/control" if backend == TOKENSELECT else None
    if control is not None:
        flags = (*flags, "--tokenselect-control", control)
    with ServerProcess(folder, *setup.flags, *flags, backend=backend) as server:
        report.say(f"{name} is ready")
        steered = Steered(server, control)
        warm_up(steered, setup, options.limit)
        report.say(f"{name} is warm")
        failed = report.failed
        for effort in options.efforts if steered.is_sparse else [""]:
            if effort:
                steered.set_level(EFFORTS[effort])
            for workload in setup.workloads:
                measure_workload({"server": name, "effort": effort}, steered, setup, workload, options.limit, report)
        if report.failed > failed:
            print(server.log_tail(), flush=True)


def about(setup: Setup, options: argparse.Namespace) -> dict[str, str]:
    described = {
        f"server {name}": " ".join((backend, *flags))
        for name in options.servers
        for backend, flags in [server_flags(setup, name)]
    }
    levels = {"efforts": ", ".join(f"{name}: level {EFFORTS[name]}" for name in options.efforts)}
    shapes = {f"workload {i}": f"{workload.name}, {workload.shape}" for i, workload in enumerate(setup.workloads, 1)}
    setting = {"sglang": version("sglang"), "setting": setup.described, "seed": str(SEED)}
    return {**where(), **setting, **shapes, "flags": " ".join(setup.flags), **described, **levels}


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.csv")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--efforts", nargs="+", choices=EFFORTS, default=list(EFFORTS))
    parser.add_argument("--workloads", nargs="+", choices=(DOCUMENT, TURNS), default=[DOCUMENT, TURNS])
    parser.add_argument("--agents", nargs="+", type=int, metavar="N", help="of the document, one cell for each")
    parser.add_argument("--system-tokens", type=int, metavar="TOKENS", help="of the shared prompt of all workloads")
    parser.add_argument(
        "--limit", type=float, default=60.0, metavar="SECONDS", help="give up an answer that takes longer"
    )
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU, to test these scripts")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_options()
    setup = chosen(SMALL if options.small else H200, options.workloads, options.agents, options.system_tokens)
    report = Report(options.out, about(setup, options), COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), setup.model)
        measure_each(options.servers, lambda name: measure_server(name, model, setup, options, report), report)


if __name__ == "__main__":
    main()
