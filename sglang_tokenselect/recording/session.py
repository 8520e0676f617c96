# SPDX-License-Identifier: Apache-2.0
"""Asks a server that records, and takes the recordings of what was asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_tokenselect.recording.recording import Recording, recording_paths
from sglang_tokenselect.server_process import ServerProcess


def record_flags(directory: Path) -> tuple[str, ...]:
    """Of a server that records; no harm on a CPU, which has no CUDA graphs."""
    return "--tokenselect-record", str(directory), "--cuda-graph-backend-decode", "disabled"


@dataclass(frozen=True)
class RecordedAnswer:
    """
    Attributes:
        answer: what `/generate` answered: `text`, `output_ids`, `meta_info`.
        recordings: of its decode steps; step i read output token i and wrote output token i + 1.
    """

    answer: dict[str, Any]
    recordings: tuple[Recording, ...]


def generate_recorded(server: ServerProcess, directory: Path, payload: dict[str, Any]) -> RecordedAnswer:
    """Asks one prompt. Nobody else may ask the server meanwhile.

    Args:
        directory: the server's `--tokenselect-record`.
        payload: of SGLang's `/generate`.

    Raises:
        RuntimeError: a decode step without a recording.
    """
    # Waits for the step that the overlap scheduler runs beyond the end of the request before.
    server.flush()
    before = set(recording_paths(directory))
    answer = server.post("/generate", payload)
    meta = answer["meta_info"]
    seq_lens = range(meta["prompt_tokens"] + 1, meta["prompt_tokens"] + meta["completion_tokens"])
    new = [Recording.load(path) for path in recording_paths(directory) if path not in before]
    recordings = tuple(recording for recording in new if recording.seq_len in seq_lens)
    if [recording.seq_len for recording in recordings] != list(seq_lens):
        found = [recording.seq_len for recording in recordings]
        raise RuntimeError(f"recordings: expected one of each length in {seq_lens}, got {found}")
    return RecordedAnswer(answer, recordings)
