# SPDX-License-Identifier: Apache-2.0
"""Records decode steps: what each query attended to, with what weights, and what a fresh selection would keep.

For debugging and for the commands `trace` and `fidelity`: it waits for the device in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.fidelity.head_group import AttentionRule, largest_weights
from sglang_tokenselect.fidelity.measure import Fidelity, measure_fidelity
from sglang_tokenselect.kernels.reference.kv import RequestKV
from sglang_tokenselect.planner import PADDING_ROW, ForwardPlan, RequestPlan
from sglang_tokenselect.recording.recording import Recording, recording_paths
from sglang_tokenselect.runner import LayerInput, Runner

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

BUDGETS = (0, 256, 512, 1024, 2048, 4096)
"""Measured beside the configured one."""


@dataclass(frozen=True)
class _LayerRecord:
    """Of one request. `attended` and `weights` are [t], empty if everything was attended to."""

    attended: np.ndarray
    weights: np.ndarray
    fidelity: Fidelity


class Recorder:
    """Writes one file per request and decode step, once the step's last layer has attended."""

    def __init__(
        self,
        directory: Path,
        config: TokenSelectConfig,
        layer_ids: Sequence[int],
        req_to_token: torch.Tensor,
        runner: Runner,
        *,
        trained_len: int | None = None,
        sliding_windows: Mapping[int, int] | None = None,
    ) -> None:
        """
        Args:
            layer_ids: of all attention layers, ascending.
            req_to_token: [num_rows, max_context_len] int32, the slot of each position of each row.
            trained_len: tokens up to which the model's own positions are known to it; None: whatever is served.
            sliding_windows: of the layers that have one, how many tokens before its own a query reads.
        """
        self.budgets = tuple(sorted({*BUDGETS, config.budget}))
        self._directory, self._config, self._layer_ids = directory, config, tuple(layer_ids)
        self._req_to_token, self._runner, self._trained_len = req_to_token, runner, trained_len
        self._sliding_windows = sliding_windows or {}
        self._requests: tuple[RequestPlan, ...] = ()
        self._records: dict[RequestPlan, dict[int, _LayerRecord]] = {}
        # Behind what another server wrote there.
        self._num_files = max((int(path.name.split("-")[0]) + 1 for path in recording_paths(directory)), default=0)

    @classmethod
    def of_model(cls, model_runner: ModelRunner, config: TokenSelectConfig, runner: Runner) -> Recorder:
        from sglang_tokenselect.model_shape import attention_layers

        if config.record is None:
            raise ValueError("record: expected a folder, got None")
        layers = attention_layers(model_runner.model)
        return cls(
            Path(config.record),
            config,
            sorted(layer.layer_id for layer in layers),
            model_runner.req_to_token_pool.req_to_token,
            runner,
            trained_len=model_runner.model_config.hf_text_config.max_position_embeddings if config.is_compact else None,
            sliding_windows={x.layer_id: x.sliding_window_size for x in layers if x.sliding_window_size > -1},
        )

    def begin(self, plan: ForwardPlan) -> None:
        """Before the first layer of each forward."""
        decoded = plan.requests if plan.is_decode else ()
        self._requests = tuple(request for request in decoded if request.req_pool_idx != PADDING_ROW)
        self._records = {request: {} for request in self._requests}

    def record(self, query: torch.Tensor, layer: LayerInput) -> None:
        """After the attention of a layer.

        Args:
            query: [num_tokens, num_qo_heads, head_dim]; un-rotated with compact positions.
        """
        for request in self._requests:
            slots = self._req_to_token[request.req_pool_idx, : request.seq_len]
            kv = layer.request_kv(slots.long())
            attended = self._runner.attended_positions(request, layer.layer_id)
            record = self._record_request(query[request.first_query], kv, layer, attended)
            self._records[request][layer.layer_id] = record
        if layer.layer_id == self._layer_ids[-1]:
            self._write()

    def _record_request(
        self, query: torch.Tensor, kv: RequestKV, layer: LayerInput, positions: torch.Tensor | None
    ) -> _LayerRecord:
        rule = AttentionRule(layer.scaling, layer.logit_cap, self._runner.rope_of(layer.layer_id))
        sliding = self._sliding_windows.get(layer.layer_id)
        if sliding is not None:
            positions = torch.arange(max(len(kv) - 1 - sliding, 0), len(kv), device=query.device)
        if positions is None:
            attended, weights = np.empty(0, np.int32), np.empty(0, np.float16)
        else:
            attended = positions.to(torch.int32).cpu().numpy()
            weights = largest_weights(query, kv, positions, rule).to(torch.float16).cpu().numpy()
        # A window's layer has no dense attention to all tokens to compare with.
        fidelity = self._undefined(query) if sliding is not None else self._measure(query, kv, rule)
        return _LayerRecord(attended, weights, fidelity)

    def _measure(self, query: torch.Tensor, kv: RequestKV, rule: AttentionRule) -> Fidelity:
        if self._trained_len is not None and len(kv) > self._trained_len:
            return self._undefined(query)
        config = self._config
        return measure_fidelity(
            query,
            kv,
            self.budgets,
            rule,
            num_sink=config.sink,
            num_local=config.local,
            vote_scale=config.vote_scale,
            score=config.selects_by.score,
        )

    def _undefined(self, query: torch.Tensor) -> Fidelity:
        return Fidelity.undefined(len(self.budgets), query.shape[0])

    def _write(self) -> None:
        for request, by_layer in self._records.items():
            records = [by_layer[layer_id] for layer_id in self._layer_ids]
            measures = {
                field.name: np.stack([getattr(r.fidelity, field.name).float().cpu().numpy() for r in records])
                for field in fields(Fidelity)
            }
            recording = Recording(
                seq_len=request.seq_len,
                req_pool_idx=request.req_pool_idx,
                layers=np.array(self._layer_ids, np.int32),
                attended=_padded([record.attended for record in records], -1),
                weights=_padded([record.weights for record in records], 0),
                budgets=np.array(self.budgets, np.int32),
                **measures,
            )
            recording.save(self._directory / f"{self._num_files:08d}-{request.req_pool_idx}.npz")
            self._num_files += 1
        self._records = {}


def _padded(rows: Sequence[np.ndarray], filler: int) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows))), filler, rows[0].dtype)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out
