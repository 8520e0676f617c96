# SPDX-License-Identifier: Apache-2.0
"""bench/serve: from a server's chunks to numbers, files and tables. No server here."""

from __future__ import annotations

import asyncio
import json
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from bench import result_file
from bench.serve import cells, client, gaps, results, run, table
from bench.serve.client import Answer
from sglang_tokenselect.server_process import ServerProcess

NEW_TOKENS = 40


def answer(first: float, gap: float, count: int = NEW_TOKENS) -> Answer:
    """One token per chunk, the first at `first` seconds."""
    return Answer(0.0, tuple(first + gap * i for i in range(count)), tuple(range(1, count + 1)))


def event(completion_tokens: int, prompt_tokens: int = 5, cached_tokens: int = 0) -> bytes:
    meta = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "cached_tokens": cached_tokens,
    }
    return b"data: " + json.dumps({"output_ids": [7] * completion_tokens, "meta_info": meta}).encode() + b"\n"


def chunks(*events: bytes) -> list[tuple[float, bytes]]:
    return [(10.0 + i, line) for i, line in enumerate(events)]


def test_gaps_count_only_while_all_decode():
    early = Answer(0.0, (0.0, 9.0, *(10.0 + i for i in range(38))), tuple(range(1, 41)))
    late = answer(first=10.0, gap=0.5, count=70)
    found = gaps.common_gaps([early, late])
    assert found.seconds == (1.0,) * 34 + (0.5,) * 69  # from 10.0 to 44.5
    assert (found.chunks, found.merged) == (103, 0)


def test_too_few_common_steps_give_no_number():
    with pytest.raises(ValueError, match="31 steps common to all requests, expected at least 32"):
        gaps.common_gaps([answer(0.0, 1.0, count=40), answer(8.0, 1.0, count=40)])


def test_a_chunk_of_two_tokens_is_two_gaps():
    tokens = (*range(1, 31), *range(32, 62))
    found = gaps.common_gaps([Answer(0.0, tuple(float(i) for i in range(60)), tokens)])
    assert sorted(found.seconds) == [0.5, 0.5] + [1.0] * 58
    assert (found.chunks, found.merged) == (59, 1)


def test_many_merged_chunks_give_no_number():
    merged = Answer(0.0, tuple(float(i) for i in range(40)), tuple(range(1, 81, 2)))
    with pytest.raises(ValueError, match="39 of 39 chunks carry more than one token, 500.000 ms a token"):
        gaps.common_gaps([merged])


def test_spread_is_median_and_percentiles():
    assert result_file.spread([float(i) for i in range(101)]) == (50.0, 20.0, 80.0)


def test_an_answer_is_its_arrivals_and_token_counts():
    parsed = client.parse(9.5, chunks(event(1), event(2), event(4)), prompt_tokens=5, new_tokens=4)
    assert parsed == Answer(9.5, (10.0, 11.0, 12.0), (1, 2, 4))
    assert parsed.ttft == 0.5


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([], "ended before its first chunk"),
        ([b'data: {"error": {"message": "too long"}}\n'], "too long"),
        ([event(1), event(2)], "5 tokens in and 4 out, got .*'completion_tokens': 2"),
        ([event(4, prompt_tokens=6)], "5 tokens in and 4 out, got .*'prompt_tokens': 6"),
        ([event(4, cached_tokens=64)], "64 tokens came from the radix cache"),
    ],
    ids=["nothing", "error", "short", "prompt", "cached"],
)
def test_what_was_not_asked_for_is_refused(events, message):
    with pytest.raises(RuntimeError, match=message):
        client.parse(0.0, chunks(*events), prompt_tokens=5, new_tokens=4)


def test_prompts_are_the_same_for_every_server_and_differ_between_repeats():
    first = client.prompts(2, 64, 512)
    assert first == client.prompts(2, 64, 512)
    assert first[0] != first[1]
    assert first != client.prompts(2, 64, 512, repeat=1)
    assert [len(ids) for ids in first] == [64, 64]
    assert all(client.FIRST_ID <= token < 512 for ids in first for token in ids)


class StreamingServer:
    """Answers each POST as SGLang does: one HTTP chunk per event."""

    def __init__(self, status: bytes, *lines: bytes) -> None:
        self._head = b"HTTP/1.1 " + status + b"\r\ntransfer-encoding: chunked\r\n\r\n"
        self._lines = lines
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self.bodies: list[bytes] = []

    def __enter__(self) -> StreamingServer:
        self._thread.start()
        started = asyncio.start_server(self._answer, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(started, self._loop).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        self.bodies.append(await reader.readexactly(length))
        writer.write(self._head)
        for line in self._lines:
            await asyncio.sleep(0.01)
            writer.write(b"%x\r\n%s\n\r\n" % (len(line) + 1, line))
        writer.write(b"0\r\n\r\n")
        writer.close()


def test_the_client_stamps_chunks_as_they_come():
    with StreamingServer(b"200 OK", event(1), event(2), event(3), b"data: [DONE]\n") as server:
        answers = client.ask(server.url, [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]], new_tokens=3)
    assert [answer.tokens for answer in answers] == [(1, 2, 3)] * 2
    # Timers may fire a clock tick early.
    assert all(later - earlier > 0.005 for a in answers for earlier, later in pairwise(a.arrivals))
    assert all(answer.ttft > 0.005 for answer in answers)
    asked = json.loads(server.bodies[0])
    assert asked["stream"] and asked["sampling_params"]["max_new_tokens"] == 3


def test_the_client_reports_a_refusal():
    refusing = StreamingServer(b"400 Bad Request", b"no such thing\n")
    with refusing as server, pytest.raises(RuntimeError, match="no such thing"):
        client.ask(server.url, [[1]], new_tokens=3)


def test_a_choice_of_cells_replaces_all():
    assert cells.plan_of("miss", None, None, quick=False) == cells.PLAN["miss"]
    assert cells.plan_of("miss", None, None, quick=True) == cells.QUICK
    options = run.parse_options(["out.csv", "--itl", "8x32768", "1x1024"])
    assert cells.plan_of("dense", options.itl, options.ttft, options.quick) == ([(8, 32768), (1, 1024)], ())


class FakeServer:
    """What Client needs of a server, and counters that move by 3 votes and 2 reuses between two readings."""

    url = "http://nowhere"

    def __init__(self) -> None:
        self.posted: list[str] = []
        self._readings = 0

    flush = ServerProcess.flush

    def post_text(self, path: str, payload: dict) -> str:
        self.posted.append(path)
        return ""

    def counters(self) -> dict[str, int]:
        self._readings += 1
        return {"votes": 3 * self._readings, "reuses": 2 * self._readings, "block_votes": 1}


def test_cells_of_one_request_are_samples_of_ttft_too(monkeypatch):
    asked = []

    def ask(url, prompts, new_tokens):
        asked.append((len(prompts), len(prompts[0]), new_tokens))
        return [answer(0.25, 0.005, new_tokens) for _ in prompts]

    monkeypatch.setattr(run, "ask", ask)
    monkeypatch.setattr(run, "NEW_TOKENS", NEW_TOKENS)
    measured = run.Client(FakeServer(), counts=True)
    assert measured.itl(1, 131072) == {
        "median": "5.0000",
        "p20": "5.0000",
        "p80": "5.0000",
        "samples": 39,
        "votes": 3,
        "reuses": 2,
        "note": "",
    }
    assert measured.ttft(131072) == {"median": "0.2500", "p20": "0.2500", "p80": "0.2500", "samples": 2}
    assert asked == [(1, 131072, NEW_TOKENS), (1, 131072, 1)]


def written(path: Path, rows: dict[tuple, float | Exception], capsys) -> run.Report:
    """A file with one row per (server, metric, batch, context): its median, or why there is none."""
    report = run.Report(path, {"gpu": "none"})
    for (server, metric, batch, context), outcome in rows.items():

        def measure(outcome=outcome):
            if isinstance(outcome, Exception):
                raise outcome
            return {"median": outcome, "p20": outcome, "p80": outcome}

        report.add({"server": server, "metric": metric, "batch": batch, "context": context}, measure)
    capsys.readouterr()
    return report


ROWS = {
    ("dense", "ITL ms", 8, 32768): 12.0,
    ("dense", "ITL ms", 1, 1024): 5.0,
    ("dense", "TTFT s", 1, 2048): 0.2,
    ("miss", "ITL ms", 8, 32768): ValueError("12 steps\ncommon"),
    ("hit", "ITL ms", 8, 32768): 6.0,
    ("default", "TTFT s", 1, 2048): 0.1,
}


def test_a_failed_cell_is_a_row_without_numbers(tmp_path, capsys):
    path = tmp_path / "out.csv"
    report = written(path, ROWS, capsys)
    about, rows = result_file.read_csv(path)
    assert about["gpu"] == "none" and about["command"].startswith("python ")
    columns = "server metric batch context median p20 p80 samples votes reuses note"
    assert " ".join(rows[0]) == columns
    assert [row["median"] for row in rows] == ["12.0", "5.0", "0.2", "", "6.0", "0.1"]
    assert rows[3]["note"] == "error: 12 steps common"
    assert report.failed == 1


def test_tables_set_servers_beside_dense(tmp_path, capsys):
    dense, others = tmp_path / "dense.csv", tmp_path / "others.csv"
    written(dense, {key: value for key, value in ROWS.items() if key[0] == "dense"}, capsys)
    written(others, {key: value for key, value in ROWS.items() if key[0] != "dense"}, capsys)
    comments, found = results.read_results([dense, others])
    assert comments["gpu"] == "none"
    assert table.ttft_table(found["TTFT s"]) == [
        "| tokens | dense | default | default: dense / it |",
        "|---|---|---|---|",
        "| 2,048 | 0.200 | 0.100 | 2.00 |",
    ]
    assert table.itl_table(found["ITL ms"]) == [
        "| requests x tokens | dense | miss | hit |",
        "|---|---|---|---|",
        "| 1 x 1,024 | 5.00 |  |  |",
        "| 8 x 32,768 | 12.00 | failed | 6.00 (0.50) |",
    ]
    assert "ITL" not in table.tables({"TTFT s": found["TTFT s"]})
