# SPDX-License-Identifier: Apache-2.0
"""Builds the runner for the device, out of SGLang's model runner."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING

import torch

from sglang_tokenselect import refusals
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.model_shape import ModelShape, attention_layers, common_logit_cap, sliding_layers
from sglang_tokenselect.patches import decode_graphs, rope
from sglang_tokenselect.runner import LayerInput, Runner

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_tokenselect.gpu_runner import GpuRunner

logger = logging.getLogger(__name__)

MIB = 2**20
LEAST_WORKSPACE_BYTES = 512 * MIB
"""What SGLang raises FlashInfer's workspace to for the models that need most."""


def create_runner(model_runner: ModelRunner, config: TokenSelectConfig) -> Runner:
    """
    Raises:
        Refusal: a model, GPU or option that the runner of this device does not serve.
    """
    if torch.device(model_runner.device).type == "cuda" and config.selects_by.has_kernels:
        return _create_gpu_runner(model_runner, config)
    from sglang_tokenselect.torch_runner import TorchRunner

    layers = attention_layers(model_runner.model)
    refusals.check_torch(model_runner.model_config, sliding_layers(layers))
    ropes = rope.take_over_rope(model_runner.model) if config.is_compact else {}
    sampled = [layer.layer_id for layer in layers if layer.layer_id not in config.dense_layers]
    return TorchRunner(config, model_runner.req_to_token_pool.req_to_token, ropes, sampled)


def _create_gpu_runner(model_runner: ModelRunner, config: TokenSelectConfig) -> GpuRunner:
    # FlashInfer and the Triton kernels are only imported where there is a GPU.
    from sglang_tokenselect.dense_backend import DenseBackend
    from sglang_tokenselect.flashinfer_attention import AttentionSpec, DecodeAttention, PrefillAttention
    from sglang_tokenselect.gpu_buffers import GpuBuffers
    from sglang_tokenselect.gpu_runner import GpuRunner

    layers = attention_layers(model_runner.model)
    sliding, logit_cap = sliding_layers(layers), common_logit_cap(layers)
    always_dense = sliding | set(config.dense_layers)
    layer_ids = [layer.layer_id for layer in layers if layer.layer_id not in always_dense]
    shape = ModelShape.of(model_runner.model_config, model_runner.kv_cache_dtype, len(layer_ids))
    capability = torch.cuda.get_device_capability(model_runner.device)
    refusals.check_gpu(capability, shape, model_runner.dtype, config, sliding)
    table = rope.common_rope(rope.take_over_rope(model_runner.model), shape.head_dim) if config.is_compact else None
    dense = None if config.is_compact else DenseBackend(model_runner, logit_cap)
    pool = model_runner.req_to_token_pool
    buffers = GpuBuffers.allocate(config, shape, max_rows=pool.size, device=model_runner.device)
    decode_graphs.capture_all()
    logger.info(
        "TokenSelect: %.0f MiB on the GPU, %.0f MiB of it for the decode selections of %d requests in %d layers",
        buffers.total_bytes / MIB,
        buffers.cache_bytes / MIB,
        config.cache_requests,
        len(layer_ids),
    )
    spec = AttentionSpec(shape, logit_cap, table.theta if table else None)
    workspace = dense.workspace_buffer if dense else _float_workspace(model_runner.device)
    runner = GpuRunner(
        config,
        layer_ids,
        buffers,
        pool.req_to_token,
        DecodeAttention(spec, workspace, buffers.int_workspace, pool.size),
        PrefillAttention(spec, workspace),
        dense=dense,
        dense_in_all_forwards=len(layer_ids) < len(layers),
        rope=table,
        sampled_layers=[partial(_layer_input, model_runner, layer) for layer in layers if layer.layer_id in layer_ids],
    )
    if runner.min_group != config.min_group:
        logger.warning(
            "TokenSelect: shared prefixes are scored for each request, as there are %d KV heads", shape.num_kv_heads
        )
    begin = time.perf_counter()
    runner.warm_up(LayerInput.of_pool(model_runner.token_to_kv_pool, layer_ids[0]))
    logger.info("TokenSelect: kernels of prefill ready after %.0f s", time.perf_counter() - begin)
    return runner


def _layer_input(model_runner: ModelRunner, layer: RadixAttention) -> LayerInput:
    return LayerInput.of_pool(model_runner.token_to_kv_pool, layer.layer_id, layer.scaling, layer.logit_cap)


def _float_workspace(device: str) -> torch.Tensor:
    """For FlashInfer, as large as SGLang makes it for any model."""
    from sglang.srt.environ import envs

    num_bytes = max(envs.SGLANG_FLASHINFER_WORKSPACE_SIZE.get(), LEAST_WORKSPACE_BYTES)
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)
