# SPDX-License-Identifier: Apache-2.0
"""What a server with the given flags would be refused for: all of it, where the server itself ends at the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from sglang_tokenselect import refusals
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.doctor.planned import PlannedServer
from sglang_tokenselect.doctor.report import Section, fill


def examine(planned: PlannedServer) -> Section:
    problems: list[str] = []
    # As a server does: when the flags are read, and once more when SGLang has filled in the others.
    for find in (_find_flags, _find_resolved, _find_in_model, _find_missing_gpus):
        problems += fill(partial(_examine_part, find, planned)).problems
    args = planned.server_args
    facts = {
        "model": args.model_path,
        "device": args.device,
        "options beside the defaults": _changed_options(planned.config),
        "seen when the weights are loaded": "layers with sliding windows, caps of logits, kinds of RoPE",
    }
    return Section(facts, list(dict.fromkeys(problems)))


def _examine_part(find: Callable[[PlannedServer], Iterable[object]], planned: PlannedServer) -> Section:
    return Section(problems=[str(found) for found in find(planned)])


def _changed_options(config: TokenSelectConfig) -> list[str]:
    defaults = TokenSelectConfig().to_options()
    return [f"{name}={value}" for name, value in config.to_options().items() if value != defaults[name]]


def _find_flags(planned: PlannedServer) -> Iterator[refusals.Refusal]:
    return refusals.find_refused_flags(planned.server_args, planned.config, options_given=planned.options_given)


def _find_resolved(planned: PlannedServer) -> Iterator[refusals.Refusal]:
    planned.resolve()
    yield from _find_flags(planned)


def _find_in_model(planned: PlannedServer) -> Iterator[refusals.Refusal]:
    model_config, config = planned.model_config(), planned.config
    found = list(refusals.find_refused_model(model_config, config))
    yield from found
    if found:  # Its shape means nothing.
        return
    if planned.has_kernels:
        yield from refusals.find_refused_gpu(_capability(), planned.shape(model_config), config, ())
    else:
        yield from refusals.find_refused_torch(model_config, ())


def _find_missing_gpus(planned: PlannedServer) -> Iterator[str]:
    import torch

    needed, found = planned.server_args.tp_size, torch.cuda.device_count()
    if planned.server_args.device == "cuda" and found < needed:
        yield f"GPUs: expected {needed} for --device cuda and --tp-size {needed}, got {found} on this machine"


def _capability() -> tuple[int, int]:
    """Of the first GPU. Where there is none, which is a problem by itself, that of those which are served."""
    import torch

    return torch.cuda.get_device_capability(0) if torch.cuda.is_available() else refusals.SERVED_CAPABILITY
