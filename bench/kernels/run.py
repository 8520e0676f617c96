# SPDX-License-Identifier: Apache-2.0
"""Measures the selection kernels and their peers in one run: python bench/kernels/run.py OUT.csv [section ...]"""

from __future__ import annotations

import gc
import sys
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, this file sees its own folder only

from bench.kernels import decode, mass, positions, prefill, shared, topk
from bench.kernels.timing import copy_bandwidth, machine
from bench.result_file import write_csv


def main(path: str, sections: list[str]) -> None:
    """Each shape is checked against float64 before it is timed; one that fails is reported and left out."""
    torch.manual_seed(0)
    copy_tbs = copy_bandwidth()
    print(f"copy: {copy_tbs:.2f} TB/s, bytes read and written")
    jobs = [
        ("decode", shape, lambda shape: decode.measure(shape, copy_tbs, is_figure=False)) for shape in decode.AIM_SHAPES
    ]
    jobs += [("shared", shape, shared.measure) for shape in shared.SHAPES]
    jobs += [("prefill", shape, prefill.measure) for shape in prefill.SHAPES]
    jobs += [("branches", prefill.BRANCHES, prefill.measure)]
    jobs += [("topk", shape, topk.measure) for shape in topk.SHAPES]
    jobs += [("positions", shape, positions.measure) for shape in positions.SHAPES]
    jobs += [("mass", shape, mass.measure) for shape in mass.SHAPES]
    jobs += [
        ("figure", shape, lambda shape: decode.measure(shape, copy_tbs, is_figure=True))
        for shape in decode.FIGURE_SHAPES
    ]
    rows, failed = [], 0
    about = {
        **machine(),
        "copy_tb_per_s": f"{copy_tbs:.3f}",
        "setting": "bfloat16, random slots, window 128 + 2048 + 512",
    }
    for section, shape, measure in jobs:
        if sections and section not in sections:
            continue
        begin = time.perf_counter()
        try:
            found = measure(shape)
        except Exception:
            traceback.print_exc(limit=-4)
            failed += 1
            continue
        rows += found
        write_csv(path, rows, about, "python " + " ".join(sys.argv))
        for line in found:
            print(f"{line['median_us']:>11} us {line.get('of_key_stream', ''):>6}  {line['series']}", flush=True)
        print(f"-- {section} {shape} in {time.perf_counter() - begin:.1f} s", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if failed:
        raise SystemExit(f"{failed} shapes failed")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
