# SPDX-License-Identifier: Apache-2.0
"""What the effort hooks cost the scheduler's thread in each decode step, in microseconds. Needs no GPU.

    python bench/load/step_cost.py OUT.csv

The hooks' own functions, called as SGLang's loop calls them, over a scheduler that is a stand-in: its attributes are
plain, its KV allocator is SGLang's. Median, 20th and 80th percentile of rounds of 200 steps. `own options` are requests
that bring a budget each. Telemetry goes to nobody, but the snapshot of each second is taken and exported.

`groups` is the search for shared prefixes, over SGLang's own tree: half of each request's nodes are everybody's. `same`
is a step of the same requests as before. `join` is one of another batch, for which everything is read anew, as it is
when a request joins (20 steps a round).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from array import array
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, this file sees its own folder only

import torch
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from bench.result_file import commit, spread, write_csv
from sglang_tokenselect import flags
from sglang_tokenselect.backend import TokenSelectAttnBackend
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.patches import effort as hooks
from sglang_tokenselect.patches import forward_requests
from sglang_tokenselect.prefix_groups import REMEMBERED, PrefixGroups
from sglang_tokenselect.runner import Runner
from sglang_tokenselect.scheduler_agent import SchedulerAgent

ROUNDS, STEPS, JOINS = 31, 200, 20
BATCHES = (1, 32, 256)
GROUP_BATCHES, CHAINS, NODE_TOKENS = (32, 256), (2, 40, 200), 64
CONFIGS = {
    "fixed": {},
    "load": {"policy": "load"},
    "slo": {"policy": "slo", "itl_target_ms": 8.0},
}


def scheduler_of(config: TokenSelectConfig, reqs: list[Any]) -> Any:
    """With what the agent reads of a scheduler."""
    server_args = SimpleNamespace(
        attention_backend="tokenselect", schedule_policy="fcfs", enable_priority_scheduling=False
    )
    flags.attach(server_args, config)
    allocator = TokenToKVPoolAllocator(100_000, dtype=torch.bfloat16, device="cpu", kvcache=None, need_sort=False)
    batch = SimpleNamespace(reqs=reqs, is_empty=lambda: False, forward_mode=SimpleNamespace(is_decode=lambda: True))
    return SimpleNamespace(
        server_args=server_args,
        metrics_collector=SimpleNamespace(labels={"model_name": "model", "tp_rank": 0}),
        waiting_queue=[SimpleNamespace(time_stats=SimpleNamespace(wait_queue_entry_time=time.perf_counter()))],
        last_batch=batch,
        running_batch=batch,
        token_to_kv_pool_allocator=allocator,
        tree_cache=SimpleNamespace(evictable_size=lambda: 1000),
        max_total_num_tokens=100_000,
        request_receiver=object(),
    )


def measure_loop(config: TokenSelectConfig, reqs: list[Any]) -> list[float]:
    """Microseconds of the three hooks of the scheduler's loop, in each round."""
    scheduler = scheduler_of(config, reqs)
    agent = SchedulerAgent(scheduler, Runner(config), is_leader=True)
    setattr(scheduler, hooks._AGENT, agent)
    hooks._agent_of_receiver[id(scheduler.request_receiver)] = agent

    def step() -> None:
        received: list[Any] = []
        hooks._deliver(received, scheduler.request_receiver)
        hooks._accept(scheduler, received)
        hooks._observe(scheduler, scheduler.running_batch)

    return rounds(step)


def measure_staging(config: TokenSelectConfig, reqs: list[Any]) -> tuple[list[float], list[float]]:
    """Microseconds of the hook that tells the backend of a forward's requests, and of one choice between graphs."""
    backend = TokenSelectAttnBackend.__new__(TokenSelectAttnBackend)
    backend.config, backend.runner, backend._prefix_groups = config, Runner(config), PrefixGroups(0, 0)
    model_runner = SimpleNamespace(attn_backend=backend)
    batch = SimpleNamespace(reqs=reqs, req_pool_indices_cpu=torch.arange(1, len(reqs) + 1), tree_cache=None)
    seq_lens = [1000] * len(reqs)
    staging = rounds(lambda: forward_requests._stage(None, object, batch, model_runner))
    return staging, rounds(lambda: backend.decode_step(seq_lens))


def measure_groups(num_requests: int, num_nodes: int) -> tuple[list[float], list[float]]:
    """Microseconds of a search for the batch of the step before, and for one that is not known."""
    tree, groups = radix_tree(), PrefixGroups(4, 0)
    reqs = [SimpleNamespace(last_node=grow_chain(tree, number, num_nodes)) for number in range(num_requests)]
    batches = iter([reqs[n:] + reqs[:n] for n in range(REMEMBERED + 1)] * ROUNDS * JOINS)  # none is known any more
    groups.find(reqs, tree)
    same = rounds(lambda: groups.find(reqs, tree))
    return same, rounds(lambda: groups.find(next(batches), tree), JOINS)


def radix_tree() -> Any:
    """What SGLang uses by default: RadixCache in 0.5.17, later UnifiedRadixCache."""
    allocator = TokenToKVPoolAllocator(1, dtype=torch.bfloat16, device="cpu", kvcache=None, need_sort=False)
    params = CacheInitParams(False, None, allocator, page_size=1)
    if not hasattr(params, "tree_core_backend"):
        return RadixCache(params)
    params.tree_components = (ComponentType.FULL,)
    return UnifiedRadixCache(params)


def grow_chain(tree: Any, number: int, num_nodes: int) -> Any:
    """The last node of a prompt that SGLang has split into nodes: earlier prompts parted from it at each."""
    common = num_nodes // 2 * NODE_TOKENS
    tokens = array("q", [1] * common + [2 + number] * (num_nodes * NODE_TOKENS - common))
    tree.insert(InsertParams(key=RadixKey(tokens), value=torch.arange(len(tokens))))
    first = NODE_TOKENS if number == 0 else common
    for end in range(first, len(tokens) + 1, NODE_TOKENS):
        match = tree.match_prefix(MatchPrefixParams(key=RadixKey(tokens[:end])))
    return match.last_device_node


def rounds(step: Any, num_steps: int = STEPS) -> list[float]:
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(num_steps):
            step()
        times.append(1e6 * (time.perf_counter() - begin) / num_steps)
    return times


def requests(count: int, custom_params: dict[str, Any] | None = None) -> list[Any]:
    sampling, salt = SimpleNamespace(custom_params=custom_params), "|tokenselect:budget=512"
    return [SimpleNamespace(sampling_params=sampling, extra_key=salt, rid="") for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.csv")
    options = parser.parse_args()
    os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", tempfile.mkdtemp())
    rows = []
    for batch in BATCHES:
        for name, given in CONFIGS.items():
            rows.append(row("loop", name, batch, measure_loop(TokenSelectConfig(**given), requests(batch))))
        own = requests(batch, {"tokenselect": {"budget": 512}})
        for name, reqs in (("no options", requests(batch)), ("own options", own)):
            for hook, times in zip(("staging", "graph"), measure_staging(TokenSelectConfig(), reqs), strict=True):
                rows.append(row(hook, name, batch, times))
    for batch in GROUP_BATCHES:
        for nodes in CHAINS:
            for case, times in zip(("same", "join"), measure_groups(batch, nodes), strict=True):
                rows.append(row("groups", f"{case}, {nodes} nodes", batch, times))
    about = {"sglang": version("sglang"), "commit": commit(), "cpu": cpu_name()}
    write_csv(options.out, rows, about, "python " + " ".join(sys.argv))


def row(hook: str, case: str, batch: int, times: list[float]) -> dict[str, object]:
    median, p20, p80 = spread(times)
    measured = {"hook": hook, "case": case, "requests": batch, "median us": f"{median:.2f}"}
    print(*measured.values(), sep="\t", flush=True)
    return {**measured, "p20 us": f"{p20:.2f}", "p80 us": f"{p80:.2f}"}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
