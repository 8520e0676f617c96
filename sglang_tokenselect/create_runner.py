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
from sglang_tokenselect.memory_plan import MemoryPlan, told_if_out_of_memory
from sglang_tokenselect.model_shape import ModelShape, attention_layers, common_logit_cap, sliding_layers
from sglang_tokenselect.patches import decode_graphs, kv_scales, rope
from sglang_tokenselect.ranks import Ranks
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

    layers = _layers_of(model_runner)
    refusals.check_torch(model_runner.model_config, sliding_layers(layers))
    ropes = rope.take_over_rope(model_runner.model) if config.is_compact else {}
    sampled = [layer.layer_id for layer in layers if layer.layer_id not in config.dense_layers]
    ranks = Ranks.of_server(model_runner.server_args, config)
    return TorchRunner(config, model_runner.req_to_token_pool.req_to_token, ropes, sampled, ranks)


def _create_gpu_runner(model_runner: ModelRunner, config: TokenSelectConfig) -> GpuRunner:
    # FlashInfer and the Triton kernels are only imported where there is a GPU.
    from sglang_tokenselect.dense_backend import DenseBackend
    from sglang_tokenselect.flashinfer_attention import AttentionSpec, DecodeAttention, PrefillAttention
    from sglang_tokenselect.gpu_buffers import GpuBuffers
    from sglang_tokenselect.gpu_runner import GpuRunner
    from sglang_tokenselect.kernels.vote_exchange import ExchangeLayout
    from sglang_tokenselect.peer_memory import open_exchange

    layers = _layers_of(model_runner)
    sliding, logit_cap = sliding_layers(layers), common_logit_cap(layers)
    always_dense = sliding | set(config.dense_layers)
    layer_ids = [layer.layer_id for layer in layers if layer.layer_id not in always_dense]
    tp_size, ranks = model_runner.server_args.tp_size, Ranks.of_server(model_runner.server_args, config)
    shape = ModelShape.of(model_runner.model_config, model_runner.kv_cache_dtype, len(layer_ids), tp_size)
    capability = torch.cuda.get_device_capability(model_runner.device)
    refusals.check_gpu(capability, shape, config, sliding)
    table = rope.common_rope(rope.take_over_rope(model_runner.model), shape.head_dim) if config.is_compact else None
    dense = None if config.is_compact else DenseBackend(model_runner, logit_cap, kv_scales.are_scaled(layers))
    pool = model_runner.req_to_token_pool
    device = torch.device(model_runner.device, model_runner.gpu_id)
    plan = MemoryPlan(config, model_runner.model_config, model_runner.kv_cache_dtype, model_runner.server_args)
    exchange = None
    with told_if_out_of_memory("the selection's buffers", plan):
        buffers = GpuBuffers.allocate(config, shape, pool.size, device, num_ranks=ranks.world_size)
        if ranks.group is not None:
            layout = ExchangeLayout.of(ranks.world_size, buffers.workspace.limits)
            exchange = open_exchange(ranks.group, layout, device)
    decode_graphs.capture_all()
    logger.info(
        "TokenSelect: %.0f MiB on the GPU, %.0f MiB of it for the decode selections of %d requests in %d layers",
        (buffers.total_bytes + (exchange.memory.nbytes if exchange else 0)) / MIB,
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
        exchange=exchange,
        sum_over_ranks=ranks.sum_ if ranks.group is not None else None,
    )
    if runner.min_group != config.min_group:
        logger.warning(
            "TokenSelect: shared prefixes are scored for each request, as there are %d KV heads", shape.num_kv_heads
        )
    begin = time.perf_counter()
    with told_if_out_of_memory("the warm-up of its kernels", plan):
        runner.warm_up(_layer_input(model_runner, next(layer for layer in layers if layer.layer_id in layer_ids)))
    logger.info("TokenSelect: kernels of prefill ready after %.0f s", time.perf_counter() - begin)
    return runner


def _layers_of(model_runner: ModelRunner) -> list[RadixAttention]:
    """Whose keys and values are written and read with the same scales from now on."""
    layers = attention_layers(model_runner.model)
    kv_scales.settle_scales(layers, model_runner.kv_cache_dtype)
    return layers


def _layer_input(model_runner: ModelRunner, layer: RadixAttention) -> LayerInput:
    return LayerInput.of_pool(model_runner.token_to_kv_pool, layer)


def _float_workspace(device: str) -> torch.Tensor:
    """For FlashInfer, as large as SGLang makes it for any model."""
    from sglang.srt.environ import envs

    num_bytes = max(envs.SGLANG_FLASHINFER_WORKSPACE_SIZE.get(), LEAST_WORKSPACE_BYTES)
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)
