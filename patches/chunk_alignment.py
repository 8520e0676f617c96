# SPDX-License-Identifier: Apache-2.0
"""Chunked prefill ends its chunks where TokenSelect's blocks end.

Symptom without it: a chunk that shares its forward with other requests is cut wherever the token
budget of the forward runs out. A block cut in two selects twice, each time with some of its
queries, so a request's output would depend on its neighbours (law 3 of the semantics).
Seam: the cut is made in `PrefillAdder`; it is moved back to a multiple of the block right after,
before the scheduler builds the batch. The adder has then reserved more tokens than are used, for
this one forward. A request that could not reach the end of its first block waits for the next
forward, unless it would be the only one in this.
May go when SGLang aligns truncated chunks to absolute positions (its `truncation_align_size`
aligns lengths, and only for deterministic inference).
"""

from __future__ import annotations

from typing import Any

from .hook import Hook

_ADDER = "sglang.srt.managers.schedule_policy.PrefillAdder"
_BLOCK = "_tokenselect_block"


def align_chunks_to(block: int) -> None:
    """Switches the alignment on, in this process."""
    from sglang.srt.managers.schedule_policy import PrefillAdder

    setattr(PrefillAdder, _BLOCK, block)


def _admit(original: Any, adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    block = getattr(adder, _BLOCK, None)
    if block is None:
        return original(adder, req, *args, **kwargs)
    if adder.can_run_list and _would_cut_first_block(adder, req, block):
        from sglang.srt.managers.schedule_policy import AddReqResult

        return AddReqResult.OTHER
    result = original(adder, req, *args, **kwargs)
    if adder.new_chunked_req is req:
        _align(req, block)
    return result


def _continue_chunked(result: Any, adder: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    block = getattr(adder, _BLOCK, None)
    if block is not None and result is req:
        _align(req, block)


def _would_cut_first_block(adder: Any, req: Any, block: int) -> bool:
    limit = adder.rem_chunk_tokens
    start = req.prefix_len if hasattr(req, "prefix_len") else len(req.prefix_indices)
    if limit is None or len(req.full_untruncated_fill_ids) - start <= limit:
        return False
    return (start + limit) // block * block <= start


def _align(req: Any, block: int) -> None:
    if hasattr(req, "extend_end"):
        req.extend_end = aligned_end(req.prefix_len, req.extend_end, block)
    else:  # SGLang before 0.5.23
        start, end = req.extend_range.start, req.extend_range.end
        req.set_extend_range(start, aligned_end(start, end, block))


def aligned_end(start: int, end: int, block: int) -> int:
    """`end` moved back to a multiple of `block`, unless nothing would be left."""
    aligned = end // block * block
    return aligned if aligned > start else end


_USES = (
    f"{_ADDER}.can_run_list",
    f"{_ADDER}.new_chunked_req",
    f"{_ADDER}.rem_chunk_tokens",
    "sglang.srt.managers.schedule_policy.AddReqResult.OTHER",
    "sglang.srt.managers.schedule_batch.Req.full_untruncated_fill_ids",
)
HOOKS = (
    Hook(f"{_ADDER}.add_one_req", "around", _admit, ("self", "req"), _USES),
    Hook(f"{_ADDER}.add_chunked_req", "after", _continue_chunked, ("self", "req")),
)
