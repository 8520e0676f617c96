# SPDX-License-Identifier: Apache-2.0
"""What a global vote costs a layer: two GPUs, half of a Llama-3-8B's heads each: python bench/kernels/ranks.py OUT.csv

`alone` is --tokenselect-vote local, `global` the default. Both ranks are timed; the slower one is told.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, this file sees its own folder only

from bench.kernels.layers import DecodeLayers, Shape
from bench.kernels.timing import Timing, machine, time_layers
from bench.result_file import write_csv
from sglang_tokenselect.kernels.vote_exchange import ExchangeLayout
from sglang_tokenselect.peer_memory import open_exchange

WORLD_SIZE = 2
LAYERS = 32
# Requests, tokens, and how many of these they have in common.
CELLS = [(1, 32_768, 0), (1, 131_072, 0), (8, 32_768, 0), (4, 131_072, 0), (32, 8_192, 0), (32, 65_792, 65_536)]


def main(path: str) -> None:
    with TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (path, folder), nprocs=WORLD_SIZE)


def run_rank(rank: int, path: str, folder: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/group", rank=rank, world_size=WORLD_SIZE)
    torch.manual_seed(rank)
    rows: list[dict[str, object]] = []
    for requests, context, shared in CELLS:
        shape = Shape(requests, context, 32 // WORLD_SIZE, 8 // WORLD_SIZE, shared)
        for series, timing in measure(rank, shape).items():
            times = torch.tensor([timing.median_us, timing.p20_us, timing.p80_us], device="cuda")
            dist.all_reduce(times, op=dist.ReduceOp.MAX)
            median, p20, p80 = times.round(decimals=2).tolist()
            rows.append({"series": series, **shape.columns, "median_us": median, "p20_us": p20, "p80_us": p80})
            if rank == 0:
                print(f"{median:9.2f} us  {requests} x {context} ({shared} shared)  {series}", flush=True)
                about = {**machine(), "gpus": str(WORLD_SIZE), "setting": "bfloat16, random slots, per layer and rank"}
                write_csv(path, rows, about, "python " + " ".join(sys.argv))
    dist.destroy_process_group()


def measure(rank: int, shape: Shape) -> dict[str, Timing]:
    found = {}
    for name in ("alone", "global"):
        # Keys of four layers are more than L2 holds.
        model = DecodeLayers(shape, 4 if shape.key_bytes > 2**26 else LAYERS)
        if shape.shared:
            model.share()
        exchange = None
        if name == "global":
            layout = ExchangeLayout.of(WORLD_SIZE, model.workspace.limits)
            exchange = open_exchange(dist.group.WORLD, layout, torch.device("cuda", rank))
            model.exchange = exchange
        found[f"{name}, no hits"] = time_together(model)
        model.batch.theta.fill_(-1.0)
        model.batch.max_reuse.fill_(2**20)
        found[f"{name}, all hits"] = time_together(model)
        del model, exchange
        torch.cuda.empty_cache()
    return found


def time_together(model: DecodeLayers) -> Timing:
    """Ranks begin each replay together, as the model's own sums make them."""
    meet = torch.zeros(1, device="cuda")
    steps = [functools.partial(model.select, index % len(model.layers)) for index in range(LAYERS)]
    return time_layers(steps, before=lambda: dist.all_reduce(meet))


if __name__ == "__main__":
    main(sys.argv[1])
