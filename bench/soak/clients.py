# SPDX-License-Identifier: Apache-2.0
"""Sends the requests of a round, each at its time whatever became of the others, and tells what came of them."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from bench.soak.traffic import Question, Request
from sglang_tokenselect.request_options import KEY
from sglang_tokenselect.server_process import ServerProcess

ANSWER_TOKENS = 32
# Of requests that are not meant to end: more than they get in their time, and enough that the pool runs out.
LONG_TOKENS = 400
LONGEST_ANSWER = 180.0  # seconds
MOST_CLIENTS = 64
ENDS = (".", "\n")


@dataclass(frozen=True)
class Outcome:
    """What came of a request.

    Attributes:
        text: of the answer, as far as it came.
        finished: ended by itself, as opposed to aborted or left.
        retractions: of the request, as far as SGLang has told.
        error: what is wrong with the reply itself; None if nothing is.
    """

    request: Request
    text: str = ""
    finished: bool = True
    retractions: int = 0
    error: str | None = None


class Clients:
    """Requests to one server; each gets a rid of its own."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._numbers = count()

    def run(self, requests: Sequence[Request]) -> list[Outcome]:
        """Returns when the last of them is through."""
        begin = time.monotonic()
        with ThreadPoolExecutor(MOST_CLIENTS) as pool:
            futures = []
            for request in requests:
                time.sleep(max(0.0, begin + request.at - time.monotonic()))
                futures.append(pool.submit(self._send, request))
            return [future.result() for future in futures]

    def alone(self, question: Question) -> str:
        """The answer on an idle server with an empty radix cache."""
        self._server.flush()
        return self._post(question)["text"]

    def _send(self, request: Request) -> Outcome:
        send = {"answer": self._answer, "abort": self._abort, "leave": self._leave, "bad": self._bad}[request.kind]
        try:
            return send(request)
        except (OSError, ValueError, KeyError) as error:
            return Outcome(request, finished=False, error=f"{type(error).__name__}: {_told(error)}")

    def _answer(self, request: Request) -> Outcome:
        outcome = _outcome(request, self._post(request.question))
        return outcome if outcome.finished else replace(outcome, error="aborted by the server")

    def _abort(self, request: Request) -> Outcome:
        rid = f"soak-{next(self._numbers)}"
        timer = threading.Timer(request.patience, self._server.post_text, ("/abort_request", {"rid": rid}))
        timer.start()
        try:
            reply = self._post(request.question, rid=rid, is_long=True)
        except urllib.error.HTTPError as error:
            return _refused(request, error, "abort")
        finally:
            timer.join()
        return _outcome(request, reply)

    def _leave(self, request: Request) -> Outcome:
        """Closes the connection at the first event after its patience; waiting for one ends with it, too."""
        body = {**_payload(request.question, is_long=True), "stream": True}
        http = urllib.request.Request(
            self._server.url + "/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        outcome, end = Outcome(request, finished=False), time.monotonic() + request.patience
        try:
            with urllib.request.urlopen(http, timeout=request.patience) as stream:
                for line in stream:
                    if line.startswith(b"data: {"):
                        outcome = _outcome(request, json.loads(line.removeprefix(b"data: ")))
                    if time.monotonic() > end:
                        break
        except TimeoutError:
            pass
        except urllib.error.URLError as error:
            if not isinstance(error.reason, TimeoutError):
                raise
        return outcome

    def _bad(self, request: Request) -> Outcome:
        payload = _payload(request.question)
        payload["sampling_params"]["custom_params"] = {KEY: request.bad}
        try:
            self._server.post("/generate", payload, LONGEST_ANSWER)
        except urllib.error.HTTPError as error:
            return _refused(request, error, f"custom_params.{KEY}")
        return Outcome(request, error=f"expected status 400 for {request.bad}, got 200")

    def _post(self, question: Question, is_long: bool = False, **fields: Any) -> dict[str, Any]:
        return self._server.post("/generate", {**_payload(question, is_long), **fields}, LONGEST_ANSWER)


def is_same(partial: str, alone: str, finished: bool) -> bool:
    """Whether a request said the same as alone, up to the end of the sentence; if cut short, as far as it came."""
    for end in ENDS:
        partial, mark, _ = partial.partition(end)
        finished = finished or bool(mark)
    return partial == alone if finished else alone.startswith(partial)


def _payload(question: Question, is_long: bool = False) -> dict[str, Any]:
    sampling: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": LONG_TOKENS if is_long else ANSWER_TOKENS}
    sampling |= {"ignore_eos": True} if is_long else {"stop": list(ENDS)}
    if question.options:
        sampling["custom_params"] = {KEY: dict(question.options)}
    return {"text": question.prompt, "sampling_params": sampling}


def _outcome(request: Request, reply: dict[str, Any]) -> Outcome:
    """Of a reply, or of an event of a stream, which has no reason to finish until the last."""
    meta = reply["meta_info"]
    reason = meta["finish_reason"]
    return Outcome(
        request,
        reply["text"],
        finished=reason is not None and reason["type"] != "abort",
        retractions=meta.get("num_retractions", 0),  # not told of what is aborted while it waits
    )


def _refused(request: Request, error: urllib.error.HTTPError, reason: str) -> Outcome:
    """The 400 that was expected, or not."""
    told = _told(error)
    if error.code == 400 and reason in told.lower():
        return Outcome(request, finished=False)
    return Outcome(request, finished=False, error=f"expected status 400 with {reason!r}, got {error.code}: {told}")


def _told(error: Exception) -> str:
    return error.read().decode(errors="replace")[:300] if isinstance(error, urllib.error.HTTPError) else str(error)
