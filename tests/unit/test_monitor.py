# SPDX-License-Identifier: Apache-2.0
"""What the monitor and `ctl` show, of real publishers, absent ones, and whatever else comes over the wire."""

from __future__ import annotations

import io
import json
import threading
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from snapshots import SNAPSHOT

from sglang_tokenselect import cli, monitor
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.controller import Controller
from sglang_tokenselect.monitor_view import ASCII_BARS, BARS, MonitorView, ladder, one_line, sparkline
from sglang_tokenselect.sockets import TelemetryServer

TCP = "tcp://127.0.0.1:0"
NOBODY = "tcp://127.0.0.1:1"
MESSAGE = json.dumps(SNAPSHOT.to_dict()).encode()
SPARSE = replace(
    SNAPSHOT, **dict.fromkeys(("itl_ms", "itl_target_ms", "mass", "min_mass", "attended_share", "hit_ratio"))
)


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def render(view: MonitorView, width: int = 120, encoding: str = "utf-8") -> str:
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding), width=width, record=True)
    console.print(view)
    return console.export_text()


def view_of(*snapshots, clock=None) -> MonitorView:
    view = MonitorView("tcp://[::1]:5", clock or Clock())
    for snapshot in snapshots:
        view.add(snapshot)
    return view


def shown(text: str) -> dict[str, str]:
    """Values by name."""
    return {line[:14].rstrip(): line[16:].rstrip() for line in text.splitlines()[1:]}


def test_the_view_shows_the_latest_snapshot():
    assert shown(render(view_of(SNAPSHOT))) == {
        "policy": "slo, level changes so far: 12",
        "level": "-1  0 [1] 2  3  4  (higher is cheaper)",
        "effort": "budget 2,048, theta 0.80, reuse up to 64 steps",
        "between tokens": "9.25 ms, target 9.50 ms",
        "attended": "2.1% of the cached tokens",
        "hit ratio": "75.0% of the selections were reused",
        "attention mass": "0.951, floor 0.900",
        "requests": "16 running, 3 waiting",
        "kv cache": "62.5% in use",
        "decode queries": "1,000, 10 dense, 300 shared, 5 uncached",
        "selections": "250 votes, 750 reuses, 40 for prefill",
        "tokens": "2,100 attended, 97,900 not read",
    }


def test_what_is_not_known_is_a_dash():
    values = shown(render(view_of(SPARSE)))
    assert (values["between tokens"], values["attention mass"]) == ("-", "-")
    assert values["hit ratio"].startswith("- of")


def test_values_beyond_their_limits_stand_out():
    console = Console(file=io.StringIO(), width=120, record=True, force_terminal=True)
    console.print(view_of(replace(SNAPSHOT, itl_ms=9.6, mass=0.95)))
    text = console.export_text(styles=True)
    assert "\x1b[31m9.60 ms" in text and "\x1b[32m0.950" in text


def test_sparklines_show_what_came_before():
    levels = [0, -1, 4, 4]
    text = render(view_of(*[replace(SNAPSHOT, level=level, hit_ratio=level / 4) for level in levels]))
    assert shown(text)["level"].endswith("  ▂▁██")
    assert shown(text)["hit ratio"].endswith("  ▁▁██")


@pytest.mark.parametrize("width", [1, 20, 40, 79, 80, 200])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_console_will_do(width, encoding):
    text = render(view_of(*[SNAPSHOT] * 100), width, encoding)
    assert max(map(len, text.splitlines())) <= width
    assert any(bar in text for bar in BARS) == (width >= 80 and encoding == "utf-8")
    assert text.isascii() or encoding == "utf-8"


def test_silence_is_told():
    clock = Clock()
    view = view_of(clock=clock)
    assert render(view) == "waiting for messages from tcp://[::1]:5\n"
    view.add(SNAPSHOT)
    assert render(view).splitlines()[0] == "TokenSelect at tcp://[::1]:5"
    clock.seconds = 12.0
    assert render(view).splitlines()[0] == "TokenSelect at tcp://[::1]:5, last message 12 s ago"


def test_sparkline_scales_and_clips():
    assert sparkline([0.0, None, 0.5, 1.0, 7.0, -3.0], 0.0, 1.0, "abc") == "a bcca"
    assert sparkline([5.0, 5.0], 5.0, 5.0, ASCII_BARS) == "__"


def test_a_ladder_of_many_levels_is_cut():
    cut = ladder(replace(SNAPSHOT, highest_level=-10, level=-10, lowest_level=10**9))
    assert cut == "[-10] -9  -8  -7  -6  -5  -4  -3  -2"


@settings(deadline=None)
@given(
    st.builds(
        lambda changes: json.dumps({**SNAPSHOT.to_dict(), **changes}).encode(),
        st.dictionaries(
            st.sampled_from(sorted(SNAPSHOT.to_dict())),
            st.none() | st.integers() | st.floats() | st.text() | st.just({"votes": 10**30}) | st.just(["slo"]),
            max_size=3,
        ),
    )
    | st.binary()
)
def test_whatever_comes_is_shown_or_passed_over(message):
    snapshot = monitor.parse_snapshot(message)
    if snapshot is not None:
        for encoding in ("ascii", "utf-8"):
            assert "\x1b" not in render(view_of(snapshot, SNAPSHOT, snapshot), encoding=encoding)
        assert one_line(snapshot).isprintable()


@pytest.mark.parametrize("message", [b"", b"[" * 100_000, b"{}", b"[]", b"\xff", b"slo", b'"slo"'])
def test_what_is_no_snapshot_is_passed_over(message):
    assert monitor.parse_snapshot(message) is None


@pytest.mark.parametrize(
    "changes",
    [{"level": None}, {"itl_ms": "9"}, {"level": 10**15}, {"counters": {"votes": 10**15}}, {"theta": float("nan")}]
    + [{"policy": policy} for policy in ("\x1b[2J", "", "[red]", "Æ")],
)
def test_a_snapshot_that_no_server_publishes_is_passed_over(changes):
    assert monitor.parse_snapshot(json.dumps({**SNAPSHOT.to_dict(), **changes}).encode()) is None


def test_a_snapshot_survives_the_wire_even_from_a_newer_server():
    assert monitor.parse_snapshot(json.dumps({**SNAPSHOT.to_dict(), "new": 1}).encode()) == SNAPSHOT


@contextmanager
def publishing(send):
    """Calls `send(socket)` over and over, and tells the endpoint."""
    is_over = threading.Event()

    def run():
        while not is_over.wait(0.01):
            send(publisher)

    with zmq.Context() as context, context.socket(zmq.PUB) as publisher:
        publisher.linger = 0
        publisher.bind(TCP)
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield publisher.get_string(zmq.LAST_ENDPOINT)
        finally:
            is_over.set()
            thread.join()


def send_all(publisher: zmq.Socket) -> None:
    publisher.send(b"garbage")
    publisher.send_multipart([MESSAGE, MESSAGE])
    publisher.send(MESSAGE)


def run_monitor(endpoint: str, timeout: float = 5.0, **options: bool) -> int:
    return monitor.run_monitor(endpoint, **({"once": True, "as_json": False} | options), timeout=timeout)


def test_once_prints_one_view_past_what_is_malformed(capsys):
    with publishing(send_all) as endpoint:
        assert run_monitor(endpoint) == 0
        assert run_monitor(endpoint, as_json=True) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"TokenSelect at {endpoint}")
    assert json.loads(out.splitlines()[-1]) == SNAPSHOT.to_dict()


@pytest.mark.parametrize("frames", [[], [b"garbage"], [MESSAGE, MESSAGE]])
def test_once_gives_up_after_the_timeout(frames, capsys):
    with publishing(lambda publisher: frames and publisher.send_multipart(frames)) as endpoint:
        assert run_monitor(endpoint, timeout=0.2) == 1
    captured = capsys.readouterr()
    assert captured.err == f"monitor: expected a message from {endpoint} within 0.2 s, got none\n"
    assert captured.out == ""


def test_an_endpoint_that_cannot_be_connected_to_is_told(capsys):
    assert run_monitor("tcp://a b:1") == 1
    error = capsys.readouterr().err
    assert "endpoint: expected one that can be connected to, got" in error and "tcp://a b:1" in error


@pytest.mark.parametrize("as_json", [True, False])
def test_elsewhere_than_in_a_terminal_messages_are_lines(as_json, monkeypatch, capsys):
    snapshots = iter([SNAPSHOT, None, replace(SNAPSHOT, level=2)])
    monkeypatch.setattr(monitor, "_snapshots", lambda subscriber: snapshots)
    assert run_monitor(NOBODY, once=False, as_json=as_json) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["level"] if as_json else int(line.split()[3]) for line in lines] == [1, 2]


def test_in_a_terminal_the_view_renews_itself(monkeypatch):
    console = Console(file=io.StringIO(), width=100, height=40, force_terminal=True, color_system=None)
    snapshots = iter([None, SNAPSHOT, replace(SNAPSHOT, level=2)])
    monkeypatch.setattr(monitor, "_snapshots", lambda subscriber: snapshots)
    monkeypatch.setattr(monitor, "Console", lambda: console)
    assert run_monitor(NOBODY, once=False) == 0
    text = console.file.getvalue()
    assert text.index("waiting for messages") < text.index("0 [1] 2") < text.index("0  1 [2]")


@pytest.fixture
def server():
    controller = Controller(TokenSelectConfig(control=TCP, itl_target_ms=20.0, load_wait_ms=1500.0))
    with closing(TelemetryServer(controller)) as server:
        yield server


def run_ctl(server: TelemetryServer, *argv: str) -> int:
    return cli.main(["ctl", "--endpoint", server.control, *argv])


def test_ctl_shows_the_options_aligned(server, capsys):
    assert run_ctl(server, "get") == 0
    assert capsys.readouterr().out.splitlines() == [
        "policy         fixed",
        "level          0",
        "itl_target_ms  20.0",
        "load_requests  32",
        "load_wait_ms   1500.0",
        "min_budget     0",
        "min_mass       none",
    ]


def test_ctl_sets_options_and_shows_them(server, capsys):
    assert run_ctl(server, "set", "policy=load", "itl_target_ms=none", "level=2") == 0
    assert "itl_target_ms  none" in capsys.readouterr().out
    config = server._controller.config
    assert (config.policy, config.itl_target_ms, config.level) == ("load", None, 2)


def test_ctl_json_prints_the_whole_answer(server, capsys):
    server.send(SNAPSHOT)
    assert run_ctl(server, "--json", "get") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["config"]["policy"] == "fixed" and answer["snapshot"] == SNAPSHOT.to_dict()


def test_ctl_tells_the_servers_refusal(server, capsys):
    assert run_ctl(server, "set", "policy=slo", "itl_target_ms=none") == 1
    captured = capsys.readouterr()
    assert captured.err == "tokenselect itl_target_ms: expected a number with policy=slo, got None\n"
    assert captured.out == ""


def test_ctl_gives_up_after_the_timeout(capsys):
    assert cli.main(["ctl", "--endpoint", NOBODY, "--timeout", "0.1", "get"]) == 1
    assert capsys.readouterr().err == f"ctl: expected an answer from {NOBODY} within 0.1 s, got none\n"


@pytest.mark.parametrize("reply", [b"hello", b'{"ok": 1}', b"[" * 5000, b'{"ok": true, "config": {"level": []}}'])
def test_ctl_tells_of_an_answer_that_is_none(reply, capsys):
    def answer_once():
        replier.recv()
        replier.send(reply)

    with zmq.Context() as context, context.socket(zmq.REP) as replier:
        replier.bind(TCP)
        thread = threading.Thread(target=answer_once)
        thread.start()
        assert cli.main(["ctl", "--endpoint", replier.get_string(zmq.LAST_ENDPOINT), "get"]) == 1
        thread.join()
    assert "expected an answer of a TokenSelect server" in capsys.readouterr().err
