# SPDX-License-Identifier: Apache-2.0
"""The columns of one turn, from its replies and from what the server counted meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from bench.agents.client import Reply
from bench.load.run import shares
from bench.result_file import spread
from bench.serve.gaps import Gaps, all_gaps, common_gaps

COLUMNS = (
    *("requests", "failed", "prompt_tokens", "seconds"),
    *("ttft_p50_s", "ttft_p20_s", "ttft_p80_s", "itl_p50_ms", "itl_p20_ms", "itl_p80_ms"),
    *("output_tokens_per_s", "decode_tokens_per_s"),
    *("radix_hit_ratio", "hit_ratio", "shared_ratio", "attended_share", "decode_queries", "votes", "reuses", "note"),
)

Row = dict[str, object]


def turn_row(outcomes: Sequence[Reply | Exception], together: bool) -> Row:
    """
    Args:
        together: times between tokens count only while all requests of the turn decode.

    Raises:
        RuntimeError: all requests failed.
        ValueError: too few steps were common to all requests.
    """
    replies = [outcome for outcome in outcomes if isinstance(outcome, Reply)]
    errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    if not replies:
        raise RuntimeError(f"all {len(errors)} requests failed: {errors[0]}")
    answers = [reply.answer for reply in replies]
    seconds = max(answer.arrivals[-1] for answer in answers) - min(answer.sent for answer in answers)
    prompt_tokens = sum(reply.prompt_tokens for reply in replies)
    # Merged chunks are noted: the times of first tokens and the throughput would be lost with the gaps.
    gaps = common_gaps(answers, max_merged=1.0) if together else all_gaps(answers)
    return {
        "requests": len(outcomes),
        "failed": len(errors),
        "prompt_tokens": prompt_tokens,
        "seconds": round(seconds, 4),
        **_spread("ttft", "s", [answer.ttft for answer in answers]),
        **_spread("itl", "ms", [1e3 * gap for gap in gaps.seconds]),
        "output_tokens_per_s": round(sum(len(reply.ids) for reply in replies) / seconds, 2),
        "decode_tokens_per_s": round(len(answers) / fmean(gaps.seconds), 2) if together else "",
        "radix_hit_ratio": round(sum(reply.cached_tokens for reply in replies) / prompt_tokens, 4),
        "note": _note(errors, gaps),
    }


def counted_row(before: Mapping[str, int], after: Mapping[str, int]) -> Row:
    """From the server's counters; {} of a dense server, which has none."""
    if not after:
        return {}
    since = {name: after[name] - before[name] for name in after}
    queries = since["decode_queries"]
    return {**shares(since), "shared_ratio": round(since["shared_queries"] / queries, 4) if queries else ""}


def _spread(name: str, unit: str, values: Sequence[float]) -> Row:
    """Median, 20th and 80th percentile; nothing of answers of one token, which have no gaps."""
    if not values:
        return {}
    percentiles = spread(values) if len(values) > 1 else values * 3
    return {f"{name}_{p}_{unit}": round(value, 4) for p, value in zip(("p50", "p20", "p80"), percentiles, strict=True)}


def _note(errors: Sequence[Exception], gaps: Gaps) -> str:
    notes = []
    if errors:
        notes.append(f"{len(errors)} requests failed: {' '.join(str(errors[0]).split())[-200:]}")
    if gaps.merged:
        notes.append(f"{gaps.merged} of {gaps.chunks} chunks with several tokens")
    return "; ".join(notes)
