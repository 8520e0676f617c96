# SPDX-License-Identifier: Apache-2.0
"""Starts a server that records, asks it, and takes the recordings of what was asked."""

from __future__ import annotations

import tempfile
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.needle_server import needle_server
from sglang_tokenselect.recording.options import ServerOptions
from sglang_tokenselect.recording.recording import Recording, recording_paths
from sglang_tokenselect.server_process import ServerProcess, allow_loopback


def record_flags(directory: Path) -> tuple[str, ...]:
    """Of a server that records, by any selector; no harm on a CPU, which has no CUDA graphs."""
    graphs = ("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled")
    return "--tokenselect-record", str(directory), *graphs


@dataclass(frozen=True)
class RecordedAnswer:
    """
    Attributes:
        answer: what `/generate` answered: `text`, `output_ids`, `meta_info`.
        recordings: of its decode steps; step i read output token i and wrote output token i + 1.
    """

    answer: dict[str, Any]
    recordings: tuple[Recording, ...]


@dataclass(frozen=True)
class Session:
    """A server that is ready.

    Attributes:
        folder: of its recordings.
        config: what it runs with.
    """

    server: ServerProcess
    folder: Path
    config: TokenSelectConfig

    def ask(self, payload: dict[str, Any]) -> RecordedAnswer:
        return generate_recorded(self.server, self.folder, payload)


@contextmanager
def recording_session(options: ServerOptions, needle_flags: tuple[str, ...] = ()) -> Iterator[Session]:
    """A server that runs within the block.

    Args:
        needle_flags: of the shipped checkpoint's server alone.

    Raises:
        SystemExit: it does not start, or does not answer.
    """
    allow_loopback()
    print("SGLang starts", flush=True)
    with tempfile.TemporaryDirectory(prefix="tokenselect-recordings-") as folder:
        server = recording_server(options, Path(folder), needle_flags)
        try:
            with server:
                config = TokenSelectConfig.from_options(server.report()["config"])
                yield Session(server, Path(folder), config)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"server: expected an answer, got {error}: {error.read().decode()[:500]}") from None
        except (RuntimeError, OSError) as error:
            raise SystemExit(f"server: expected an answer, got {error}\nIts log: {server.log_path}") from None


def recording_server(options: ServerOptions, folder: Path, needle_flags: tuple[str, ...] = ()) -> ServerProcess:
    """One that is not started yet. Of a flag that is given twice the later one wins."""
    flags = (*options.flags, *record_flags(folder))
    if options.model_path is None:
        return needle_server(False, *needle_flags, *flags, device=options.device)
    return ServerProcess(options.model_path, *flags)


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
