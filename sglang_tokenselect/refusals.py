# SPDX-License-Identifier: Apache-2.0
"""What TokenSelect does not serve, refused at start with the reason: never silently dense or wrong."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from sglang_tokenselect import compat
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.plugin import BACKEND

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig

    from sglang_tokenselect.model_shape import ModelShape

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Gemma2ForCausalLM",
)

_ONE_REPLICA = (
    "effort, telemetry and control are of one replica; start a server for each, and SGLang's router before them"
)

# ServerArgs field: (the only values served, what the others would need). None means "not set".
_SERVED_FLAGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "device": ((None, "cpu", "cuda"), "there are no kernels for other devices"),
    "prefill_attention_backend": ((None, BACKEND), "both phases run in one backend"),
    "decode_attention_backend": ((None, BACKEND), "both phases run in one backend"),
    "speculative_algorithm": ((None, "NONE"), "draft and verify steps have no selection yet"),
    "page_size": ((None, 1), "tokens are selected one by one"),
    "pp_size": ((1,), "a stage has some of the layers, but effort, samples and counters are of all"),
    "dp_size": ((1,), _ONE_REPLICA),
    "enable_dp_attention": ((False,), _ONE_REPLICA),
    "attn_cp_size": ((1,), "a prefill's tokens are dealt out to ranks, which cuts its blocks"),
    "dcp_size": ((1,), "a request's keys lie on several ranks, and a selection is made of those on one"),
    "kv_cache_dtype": (("auto", "bf16", "bfloat16", "fp8_e4m3"), "the kernels score no keys of other types"),
    "disaggregation_mode": (("null",), "a selection is not handed from prefill to decode servers"),
    "dllm_algorithm": ((None,), "block diffusion has no decode query"),
    "tokenizer_worker_num": ((1,), "extra tokenizer workers load no plugins"),
    "enable_hierarchical_cache": ((False,), "keys that come back from other memory during a forward were not tested"),
    "enable_lmcache": ((False,), "keys from caches outside SGLang were not tested"),
    "enable_flexkv": ((False,), "keys from caches outside SGLang were not tested"),
    "radix_cache_backend": ((None,), "others than SGLang's own were not tested"),
    "enable_mixed_chunk": ((False,), "a decode query in a prefill batch has no selection yet"),
    "enable_two_batch_overlap": ((False,), "it runs several backends, and a selection is kept in one"),
    "enable_pdmux": ((False,), "it runs several backends, and a selection is kept in one"),
    "enable_torch_compile": ((False,), "the runner is not compiled"),
    "enable_deterministic_inference": ((False,), "a score's last digit depends on the batch"),
}

SERVED_CAPABILITY = (9, 0)
"""Compute capability of the GPUs that are served."""

_GPU_ONLY = ("Qwen2MoeForCausalLM",)

_SERVED_GRAPHS: dict[str, tuple[tuple[str, ...], str]] = {
    "prefill": (("breakable", "disabled"), "the blocks of a prefill differ from forward to forward"),
    "decode": (("full", "disabled"), "others were not tested"),
}


class Refusal(ValueError):
    """A flag or model that TokenSelect does not serve, told as name, expected, got."""

    def __init__(self, name: str, expected: str, got: object, reason: str = "") -> None:
        super().__init__(f"tokenselect: {name}: expected {expected}, got {got}" + (f" ({reason})" if reason else ""))


def check_server_args(server_args: Any, config: TokenSelectConfig, *, options_given: bool = False) -> None:
    """Refuses flags that do not go with the backend. Runs before any model is loaded.

    Args:
        options_given: TokenSelect options were given, so another backend is refused too.

    Raises:
        Refusal: the first flag that is not served.
    """
    _raise_first(find_refused_flags(server_args, config, options_given=options_given))


def find_refused_flags(
    server_args: Any, config: TokenSelectConfig, *, options_given: bool = False
) -> Iterator[Refusal]:
    """All that `check_server_args` would refuse, one after the other."""
    if not _asks_for_backend(server_args):
        if options_given:
            expected = f"{BACKEND!r}, since its options are given"
            yield Refusal("attention_backend", expected, server_args.attention_backend)
        return
    if server_args.attention_backend != BACKEND:
        reason = "both phases run in one backend"
        yield Refusal("attention_backend", repr(BACKEND), server_args.attention_backend, reason)
    for name, (served, reason) in _SERVED_FLAGS.items():
        value = getattr(server_args, name, served[0])
        if value not in served:
            yield Refusal(name, " or ".join(map(repr, served)), repr(value), reason)
    yield from _refused_by(_check_chunks, getattr(server_args, "chunked_prefill_size", None), config)
    yield from _find_for_device(server_args, config)
    yield from _refused_by(_check_record, config.record, getattr(server_args, "tp_size", 1))


def check_model(model_config: ModelConfig, config: TokenSelectConfig) -> None:
    """Refuses models by their configuration; the special reasons come before the list of what is served."""
    _raise_first(find_refused_model(model_config, config))


def find_refused_model(model_config: ModelConfig, config: TokenSelectConfig) -> Iterator[Refusal]:
    """All that `check_model` would refuse, one after the other."""
    hf_config = model_config.hf_text_config
    kind = _unserved_kind(model_config, hf_config)
    architecture = (model_config.hf_config.architectures or [None])[0]
    if kind is not None:
        yield Refusal("model", "decoder with full softmax attention in every layer", f"{architecture}: {kind}")
        return
    if architecture not in ARCHITECTURES:
        yield Refusal("model", f"one of {', '.join(ARCHITECTURES)}", architecture)
        return
    if config.min_len is not None and config.min_len >= model_config.context_len:
        yield Refusal("min_len", f"less than the context length of {model_config.context_len}", config.min_len)
    if wrong := [layer for layer in config.dense_layers if layer >= model_config.num_hidden_layers]:
        yield Refusal("dense_layers", f"layers below {model_config.num_hidden_layers}", wrong)
    if config.is_compact:
        yield from _refused_by(_check_compact, hf_config, config)


def check_torch(model_config: ModelConfig, sliding_layers: Collection[int]) -> None:
    """What the runner for CPUs, or SGLang on a CPU, does not serve."""
    _raise_first(find_refused_torch(model_config, sliding_layers))


def find_refused_torch(model_config: ModelConfig, sliding_layers: Collection[int]) -> Iterator[Refusal]:
    """All that `check_torch` would refuse, one after the other."""
    if sliding_layers:
        yield Refusal("model", "no sliding-window layers on a CPU", f"layers {sorted(sliding_layers)}")
    architecture = model_config.hf_config.architectures[0]
    if architecture in _GPU_ONLY:
        yield Refusal("model", f"not {' or '.join(_GPU_ONLY)} on a CPU", architecture, "SGLang needs a GPU for it")
    own = getattr(model_config.hf_config, "original_total_num_kv_heads", None)  # SGLang's, if it added some on a CPU
    if own is not None and (num_kv_heads := model_config.get_total_num_kv_heads()) != own:
        got = f"one for which SGLang makes them {num_kv_heads}"
        yield Refusal("tp_size", f"a divisor of the {own} KV heads on a CPU", got, "heads that it adds would vote")


def check_gpu(
    capability: tuple[int, int],
    shape: ModelShape,
    config: TokenSelectConfig,
    sliding_layers: Collection[int],
) -> None:
    """What the kernels for GPUs do not serve, of the device and the loaded model.

    Args:
        capability: compute capability of the device.
        shape: its layers are those that select.
    """
    _raise_first(find_refused_gpu(capability, shape, config, sliding_layers))


def find_refused_gpu(
    capability: tuple[int, int],
    shape: ModelShape,
    config: TokenSelectConfig,
    sliding_layers: Collection[int],
) -> Iterator[Refusal]:
    """All that `check_gpu` would refuse, one after the other."""
    import torch

    from sglang_tokenselect.kernels.paged_keys import HALF_DTYPES, HEAD_DIMS

    if capability != SERVED_CAPABILITY:
        got = f"{capability[0]}.{capability[1]}"
        yield Refusal("GPU", "compute capability 9.0 (H100, H200)", got, "others were not tested")
    if shape.head_dim not in HEAD_DIMS:
        yield Refusal("model", f"head_dim {' or '.join(map(str, HEAD_DIMS))}", f"head_dim {shape.head_dim}")
    if shape.dtype not in HALF_DTYPES:
        yield Refusal("dtype", "bfloat16 or float16", shape.dtype)
    if shape.kv_dtype not in (shape.dtype, torch.float8_e4m3fn):
        yield Refusal("kv_cache_dtype", f"the model's {shape.dtype} or {torch.float8_e4m3fn}", shape.kv_dtype)
    # Known only now: "auto" is float8 for checkpoints that say so.
    yield from _refused_by(_check_compact_keys, shape.kv_dtype == torch.float8_e4m3fn, config)
    if not shape.num_layers:
        yield Refusal("dense_layers", "a layer that selects", sorted(config.dense_layers))
    if config.is_compact and sliding_layers:
        yield Refusal("positions=compact", "no sliding-window layers", f"layers {sorted(sliding_layers)}")


def _check_compact_keys(are_float8: bool, config: TokenSelectConfig) -> None:
    if are_float8 and config.is_compact:
        reason = "FlashInfer's kernels that rotate keys read no float8"
        raise Refusal("kv_cache_dtype", "the model's type with compact positions on a GPU", "fp8_e4m3", reason)


def _raise_first(refusals: Iterator[Refusal]) -> None:
    for refusal in refusals:
        raise refusal


def _refused_by(check: Callable[..., None], *args: Any) -> Iterator[Refusal]:
    try:
        check(*args)
    except Refusal as refusal:
        yield refusal


def _asks_for_backend(server_args: Any) -> bool:
    names = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    return BACKEND in [getattr(server_args, name, None) for name in names]


def _check_chunks(chunked_prefill_size: int | None, config: TokenSelectConfig) -> None:
    if chunked_prefill_size is not None and chunked_prefill_size > 0 and chunked_prefill_size % config.block:
        reason = "so that the output does not depend on the chunks"
        raise Refusal("chunked_prefill_size", f"a multiple of block={config.block}", chunked_prefill_size, reason)


def _find_for_device(server_args: Any, config: TokenSelectConfig) -> Iterator[Refusal]:
    import torch

    device = getattr(server_args, "device", None)
    if device == "cuda":
        if untested := compat.untested_on_gpus():
            yield Refusal(*untested, "others were not tested with a GPU")
            return  # They may not have what the rest reads.
        if config.selects_by.has_kernels:
            yield from _refused_by(_check_kernel_options, config)
            yield from _refused_by(
                _check_compact_keys, getattr(server_args, "kv_cache_dtype", "auto") == "fp8_e4m3", config
            )
        yield from _find_graphs(server_args.cuda_graph_config, config)
        if server_args.enable_lora:
            yield Refusal("enable_lora", "False", "True", "its CUDA graphs take the place of those that select")
    elif device == "cpu" and torch.cuda.is_available():
        yield Refusal("device", "'cuda', or CUDA_VISIBLE_DEVICES='' for a server on the CPU", "'cpu' beside a GPU")


def _check_kernel_options(config: TokenSelectConfig) -> None:
    from sglang_tokenselect.kernels.block_plan import count_rows_per_block
    from sglang_tokenselect.kernels.workspace import MAX_BUDGET

    if config.largest_budget > MAX_BUDGET:
        name = "budget" if config.max_budget is None else "max_budget"
        raise Refusal(name, f"at most {MAX_BUDGET} on a GPU", config.largest_budget)
    try:
        count_rows_per_block(config.block, config.queries_per_vote)
    except ValueError as error:
        raise Refusal("sub_block", "what the kernels for GPUs can tile", config.sub_block, str(error)) from None


def _served_graphs(config: TokenSelectConfig) -> dict[str, tuple[tuple[str, ...], str]]:
    none = ("disabled",)
    if not config.selects_by.has_kernels:
        reason = f"selector={config.selector} runs in PyTorch, request by request"
        return dict.fromkeys(_SERVED_GRAPHS, (none, reason))
    if config.record is not None:
        return {**_SERVED_GRAPHS, "decode": (none, "a replayed graph tells nobody what it attended to (option record)")}
    return _SERVED_GRAPHS


def _find_graphs(cuda_graph_config: Any, config: TokenSelectConfig) -> Iterator[Refusal]:
    for phase, (served, reason) in _served_graphs(config).items():
        backend = getattr(cuda_graph_config, phase).backend
        if backend not in served:
            yield Refusal(f"cuda_graph_backend_{phase}", " or ".join(map(repr, served)), repr(backend), reason)


def _check_record(folder: str | None, tp_size: int) -> None:
    if folder is None:
        return
    if tp_size > 1:
        raise Refusal("tp_size", "1 with record", tp_size, "a recording has the heads of one rank")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Refusal("record", "a folder to write to", repr(folder), str(error)) from None


def _unserved_kind(model_config: Any, hf_config: Any) -> str | None:
    from sglang.srt.configs.model_config import AttentionArch

    if model_config.attention_arch == AttentionArch.MLA:
        return "multi-head latent attention (MLA) keeps no keys per head"
    if model_config.is_encoder_decoder:
        return "cross attention reads an encoder's keys"
    if not model_config.is_generation:
        return "an encoder or embedding model does not decode"
    if model_config.is_multimodal:
        return "a multimodal model"
    if any(
        getattr(hf_config, name, None) for name in ("linear_num_value_heads", "mamba_d_state", "linear_attn_config")
    ):
        return "a hybrid with linear attention keeps a state, not keys"
    return None


def _check_compact(hf_config: Any, config: TokenSelectConfig) -> None:
    rope = getattr(hf_config, "rope_scaling", None) or getattr(hf_config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise Refusal("positions=compact", "a plain RoPE (no scaling)", f"rope_type={kind}")
    window = replace(config.window, budget=config.largest_budget)
    longest, trained = window.dense_len + config.block, hf_config.max_position_embeddings
    if longest > trained:
        sizes = "min_len + block" if window.min_len > window.size else "sink + budget (or max_budget) + local + block"
        raise Refusal(sizes, f"at most the trained length {trained} with compact positions", longest)
