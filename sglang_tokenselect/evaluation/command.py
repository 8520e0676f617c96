# SPDX-License-Identifier: Apache-2.0
"""`sglang-tokenselect eval`: finds the servers, asks them, and reports."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from itertools import product
from pathlib import Path

from rich.console import Console

import sglang_tokenselect
from sglang_tokenselect.demo import attended_between
from sglang_tokenselect.evaluation.client import Client
from sglang_tokenselect.evaluation.discover import Server, discover, read_counters
from sglang_tokenselect.evaluation.drawer import Drawer
from sglang_tokenselect.evaluation.options import depths_of, named_urls
from sglang_tokenselect.evaluation.report import write_reports
from sglang_tokenselect.evaluation.run import ask_targets
from sglang_tokenselect.evaluation.settings import Key, Run, Settings, Target
from sglang_tokenselect.evaluation.store import Record, Store, joined, open_store, read_records, read_run
from sglang_tokenselect.evaluation.table import print_table
from sglang_tokenselect.evaluation.tokenizer import load_tokenizer
from sglang_tokenselect.evaluation.view import Tally, open_view
from sglang_tokenselect.server_process import allow_loopback

LIBRARIES = ("openai", "transformers", "tokenizers")


def run_eval(args: argparse.Namespace) -> int:
    """Returns 0 if all was answered, 1 if requests failed for good."""
    console = Console()
    if args.show:
        report(console, args.out, read_run(args.out), read_records(args.out))
        return 0
    allow_loopback()
    servers = {name: discover(url, args.api_key, args.model) for name, url in named_urls(args).items()}
    run = joined(args.out, plan(args, servers))
    check_longest(run.settings, servers)
    drawer = Drawer(run.settings, load_tokenizer(run.settings.tokenizer, args.api))
    check_lengths(run.settings, drawer)
    with open_store(args.out, run) as (run, store):
        before = all_counters(servers, args.api_key)
        failure = ask(console, args, run, servers, drawer, store)
        after = all_counters(servers, args.api_key)
        report(console, args.out, run, store.records)
    for name in servers:
        say(console, attended_text(name, before[name], after[name]))
    if failure:
        say(console, f"Stopped: {failure}")
    num_failed = sum(record.error is not None for key, record in store.records.items() if key.target in servers)
    if num_failed:
        say(console, f"{num_failed:,} questions failed; the same command asks them again. Reasons: results.json")
    return 1 if failure or num_failed else 0


def plan(args: argparse.Namespace, servers: Mapping[str, Server]) -> Run:
    """What the options ask for."""
    settings = Settings(
        version=sglang_tokenselect.__version__,
        tasks=args.tasks,
        lengths=args.lengths,
        seeds=args.seeds,
        samples=args.samples,
        depths=depths_of(args),
        api=args.api,
        tokenizer=args.tokenizer or common_tokenizer(servers),
    )
    targets = {name: Target(name, s.url, s.model, args.extra_body, s.facts) for name, s in servers.items()}
    return Run(settings, targets, {name: version(name) for name in LIBRARIES})


def common_tokenizer(servers: Mapping[str, Server]) -> str:
    """Both targets are asked the same questions, so one tokenizer counts their tokens."""
    names = sorted({server.tokenizer for server in servers.values()})
    if len(names) > 1:
        raise SystemExit(f"--tokenizer: expected one that serves both, got none, and {' and '.join(names)} by default")
    return names[0]


def check_longest(settings: Settings, servers: Mapping[str, Server]) -> None:
    """
    Raises:
        SystemExit: a server takes less than the longest texts.
    """
    longest = max(settings.lengths)
    for name, server in servers.items():
        if server.max_length is not None and longest > server.max_length:
            raise SystemExit(
                f"--lengths: expected at most the {server.max_length:,} that {name} takes, got {longest:,}"
            )


def check_lengths(settings: Settings, drawer: Drawer) -> None:
    """Each length of each task, since a longer one may have less room left: cwe repeats its words more often there.

    Raises:
        SystemExit: a length does not do for a task.
    """
    for length, task in product(sorted(settings.lengths), settings.tasks):
        try:
            drawer.check(Key("", task, length, settings.seeds[0], 0))
        except ValueError as error:
            raise SystemExit(f"--lengths: {task} cannot be asked in {length:,} tokens; {error}") from None


def ask(
    console: Console, args: argparse.Namespace, run: Run, names: Iterable[str], drawer: Drawer, store: Store
) -> str | None:
    """Asks these targets what the store lacks. Returns why it ended early, if it did."""
    keys = {name: list(run.settings.keys(name)) for name in names}
    missing = [key for found in keys.values() for key in found if not store.is_answered(key)]
    tallies = {name: Tally(found, store.records) for name, found in keys.items()}
    clients = {name: Client(run.targets[name], args.api, args.api_key, args.timeout) for name in keys}
    try:
        with open_view(console, tallies) as view:
            return ask_targets(clients, drawer, store, args.concurrency, missing, view.add)
    except KeyboardInterrupt:
        num_answered = sum(map(store.is_answered, (key for found in keys.values() for key in found)))
        say(
            console,
            f"Interrupted: {num_answered:,} of {sum(map(len, keys.values())):,} questions are answered. "
            "The same command goes on from there; with --show in place of the server it reports what is there.",
        )
        raise


def report(console: Console, folder: Path, run: Run, records: Mapping[Key, Record]) -> None:
    print_table(console, run, write_reports(folder, run, records))
    say(console, f"Reports: {folder}")


def all_counters(servers: Mapping[str, Server], api_key: str | None) -> dict[str, dict[str, int]]:
    return {name: read_counters(server.url, api_key) for name, server in servers.items()}


def attended_text(name: str, before: Mapping[str, int], after: Mapping[str, int]) -> str | None:
    """What decode of a TokenSelect server read meanwhile, on average; None from other servers."""
    if any(after.get(name, 0) < count for name, count in before.items()):
        return None  # It has ended or begun anew.
    read = attended_between(dict(before), dict(after))
    if not read:
        return None
    attended, share = read["attended"], read["attended_share"]
    if share == 1:
        return f"{name}: each decode step attended to all cached tokens, {attended:,.0f} on average"
    return f"{name}: a decode step attended to {attended:,.0f} of {attended / share:,.0f} cached tokens, {share:.1%}"


def say(console: Console, text: str | None) -> None:
    if text:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
