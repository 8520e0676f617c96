# SPDX-License-Identifier: Apache-2.0
"""A stand-in for any OpenAI-compatible server."""

from __future__ import annotations

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Endpoint:
    """An OpenAI-compatible server whose answers a function of the prompt gives.

    Attributes:
        requests: path and body of each request.
        most_at_once: requests that were under way together.
        routes: JSON objects of GET requests.
        api_key: that GET requests need, if any.
    """

    def __init__(self, answer):
        self.answer = answer
        self.requests, self.most_at_once, self._now = [], 0, 0
        self._lock = threading.Lock()
        self.api_key = None
        self.routes = {"/v1/models": {"data": [{"id": "small", "max_model_len": 5000}]}}

    def reply(self, path, body):
        """Status, and JSON or bytes."""
        with self._lock:
            self.requests.append((path, body))
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            is_chat = path.endswith("/chat/completions")
            status, choice = self.answer(body["messages"][0]["content"] if is_chat else body["prompt"])
            if status != 200:
                return status, {"error": {"message": choice}}
            text = {"message": {"role": "assistant", "content": choice}} if is_chat else {"text": choice}
            choices = [{"index": 0, "finish_reason": "stop", "logprobs": None, **text}]
            return 200, {"id": "1", "object": "x", "created": 0, "model": "small", "choices": choices}
        finally:
            with self._lock:
                self._now -= 1


@contextmanager
def serving(answer):
    endpoint = Endpoint(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            if endpoint.api_key and self.headers["Authorization"] != f"Bearer {endpoint.api_key}":
                return self._send(401, {})
            found = self.path in endpoint.routes
            self._send(200 if found else 404, endpoint.routes.get(self.path, {}))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*endpoint.reply(self.path, body))

        def _send(self, status, content):
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()


def finds_number(prompt):
    return 200, re.search(r"\d{6}", prompt)[0]
