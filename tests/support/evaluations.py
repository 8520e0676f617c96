# SPDX-License-Identifier: Apache-2.0
"""A small evaluation, its records, and the command on a stand-in for a server."""

from __future__ import annotations

from sglang_tokenselect import cli
from sglang_tokenselect.evaluation.settings import Run, Settings, Target
from sglang_tokenselect.evaluation.store import Record

SETTINGS = Settings(
    version="0",
    tasks=("needle_single", "vt"),
    lengths=(2048, 1024),
    seeds=(0, 1),
    samples=2,
    depths=2,
    api="completions",
    tokenizer="t",
)
RUN = Run(SETTINGS, {"a": Target("a", "http://a", "m"), "b": Target("b", "http://b", "m")}, {})


def record(key, score=1.0, depth=None, error=None):
    return Record(*key, depth=depth, answers=("7",), score=None if error else score, error=error)


def evaluate(endpoint, tokenizer, out, *argv):
    options = ("--tasks", "needle_single", "--lengths", "512,1024", "--samples", "3", "--tokenizer", tokenizer)
    args = cli.build_parser().parse_args(["eval", "--url", endpoint.url, *options, "--out", str(out), *argv])
    return args.run(args)
