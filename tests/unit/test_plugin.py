# SPDX-License-Identifier: Apache-2.0
"""The plugin inside real SGLang: boot order, idempotence, hooks, versions, refusals."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import write_config
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs

from sglang_tokenselect import compat, cpu_platform, plugin, refusals
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.model_shape import ModelShape
from sglang_tokenselect.patches import chunk_alignment

REPO = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def loaded():
    load_plugins()


def test_entry_points_are_declared():
    assert entry_points(group="sglang.srt.plugins")["tokenselect"].value == "sglang_tokenselect.plugin:register"
    platform = entry_points(group="sglang.srt.platforms")[cpu_platform.NAME]
    assert platform.value == "sglang_tokenselect.cpu_platform:activate"


def test_import_is_silent_and_light():
    """Importing the package registers nothing and loads neither SGLang nor torch."""
    loaded = "[name for name in ('sglang', 'torch') if name in sys.modules]"
    code = f"import sys, sglang_tokenselect, sglang_tokenselect.plugin; print({loaded})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_second_load_changes_nothing():
    before, wrapped = ATTENTION_BACKENDS["tokenselect"], ServerArgs.from_cli_args.__func__
    plugin.register()
    load_plugins()
    assert ATTENTION_BACKENDS["tokenselect"] is before
    assert ServerArgs.from_cli_args.__func__ is wrapped
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)  # argparse raises on a flag that is added twice
    assert "--tokenselect-budget" in parser.format_help()


ENGINE_FIRST = "from sglang.srt.entrypoints.engine import Engine"
PLUGINS_FIRST = f"from sglang.srt.plugins import load_plugins; load_plugins(); {ENGINE_FIRST}"


@pytest.mark.parametrize("imports", [PLUGINS_FIRST, ENGINE_FIRST], ids=["plugins-first", "engine-first"])
def test_the_engine_knows_the_keyword_in_either_order(imports):
    code = f"{imports}\nEngine(model_path='/nowhere', attention_backend='tokenselect', tokenselect={{'budgte': 1}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ConfigError: tokenselect option: expected one of budget, " in done.stderr


@pytest.mark.parametrize("version", ["0.5.16", "0.5.24", "0.6.0", "1.0"])
def test_other_sglang_versions_are_refused(version, monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: version)
    with pytest.raises(RuntimeError, match=f"sglang: expected >=0.5.17,<0.5.24, got {version}"):
        plugin.register()


@pytest.mark.parametrize("version", ["0.5.17", "0.5.17.post1", "0.5.23rc1"])
def test_versions_of_the_range_pass(version, monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: version)
    compat.check_sglang_version()


def test_the_platform_may_be_asked_while_sglang_is_imported():
    """Seen on a GPU machine: SGLang looks for platforms in the middle of its own import."""
    code = "from sglang_tokenselect.cpu_platform import activate; print(activate()); import sglang.srt.platforms"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "partially initialized" not in done.stderr
    assert done.stdout.strip() == cpu_platform.PLATFORM
    from sglang.srt.platforms import current_platform

    assert f"{type(current_platform).__module__}.{type(current_platform).__name__}" == cpu_platform.PLATFORM


def test_the_platform_steps_aside(monkeypatch):
    assert cpu_platform.activate() == cpu_platform.PLATFORM
    with monkeypatch.context() as patch:
        patch.setenv("SGLANG_USE_CPU_ENGINE", "1")
        assert cpu_platform.activate() is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        assert cpu_platform.activate() is None
    other = entry_points(group="console_scripts")
    monkeypatch.setattr(cpu_platform, "entry_points", lambda group: other)
    assert cpu_platform.activate() is None
    monkeypatch.setenv("SGLANG_PLATFORM", cpu_platform.NAME)
    assert cpu_platform.activate() is not None


def test_bare_kernels_is_the_package_that_transformers_imports():
    """`kernels/` without __init__.py loses against the installed distribution, even from the repository's root."""
    code = "import kernels; print(kernels.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert "site-packages" in found
    assert importlib.util.find_spec("sglang_tokenselect.kernels.reference.vote") is not None


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("llama"), "llama", "LlamaForCausalLM")


def server_args(model, *argv):
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    base = ["--model-path", str(model), "--device", "cpu", "--load-format", "dummy", "--skip-tokenizer-init"]
    return ServerArgs.from_cli_args(parser.parse_args([*base, *argv]))


OURS = ("--attention-backend", "tokenselect")
REFUSED_FLAGS = [
    (
        ["--attention-backend", "torch_native", "--tokenselect-budget", "9"],
        "attention_backend: expected 'tokenselect', since",
    ),
    (
        ["--attention-backend", "torch_native", "--prefill-attention-backend", "tokenselect"],
        "both phases run in one backend",
    ),
    ([*OURS, "--decode-attention-backend", "torch_native"], "decode_attention_backend: expected None or 'tokenselect'"),
    ([*OURS, "--page-size", "16"], "page_size: expected None or 1, got 16"),
    ([*OURS, "--dp-size", "2"], "dp_size: expected 1, got 2 .effort, telemetry and control are of one replica"),
    ([*OURS, "--pp-size", "2"], "pp_size: expected 1, got 2 .a stage has some of the layers"),
    ([*OURS, "--dcp-size", "2"], "dcp_size: expected 1, got 2 .a request's keys lie on several ranks"),
    ([*OURS, "--tp-size", "2", "--tokenselect-record", "/tmp"], "tp_size: expected 1 with record, got 2"),
    ([*OURS, "--kv-cache-dtype", "fp8_e5m2"], "kv_cache_dtype: expected 'auto' .* 'fp8_e4m3', got 'fp8_e5m2'"),
    ([*OURS, "--tokenizer-worker-num", "2"], "tokenizer_worker_num: expected 1, got 2"),
    ([*OURS, "--enable-mixed-chunk"], "enable_mixed_chunk: expected False, got True"),
    ([*OURS, "--chunked-prefill-size", "1000"], "chunked_prefill_size: expected a multiple of block=128, got 1000"),
    ([*OURS, "--tokenselect-block", "100"], "sub_block: expected a divisor of block=100, got 16"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED_FLAGS, ids=lambda x: x if isinstance(x, str) else "")
def test_flag_mixes_are_refused_before_any_model_is_loaded(llama, argv, message):
    with pytest.raises(SystemExit, match=message):
        server_args(llama, *argv)


def test_the_flags_that_are_checked_exist(llama):
    args = server_args(llama, *OURS)
    for name in refusals._SERVED_FLAGS:
        assert hasattr(args, name), name


def test_speculative_decoding_is_refused():
    """Without a draft model SGLang's own checks would come first, so the flag is looked at alone."""
    args = SimpleNamespace(attention_backend="tokenselect", speculative_algorithm="EAGLE")
    with pytest.raises(refusals.Refusal, match="speculative_algorithm: expected None or 'NONE', got 'EAGLE'"):
        refusals.check_server_args(args, TokenSelectConfig())


MLA = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
REFUSED_MODELS = [
    ("deepseek_v2", "DeepseekV2ForCausalLM", MLA, "latent attention"),
    ("mllama", "MllamaForConditionalGeneration", {}, "cross attention"),
    ("bert", "BertModel", {}, "does not decode"),
    ("qwen3_next", "Qwen3NextForCausalLM", {}, "linear attention"),
    ("gemma", "GemmaForCausalLM", {}, "model: expected one of LlamaForCausalLM"),
]


def model_config(folder):
    from sglang.srt.configs.model_config import ModelConfig

    return ModelConfig(str(folder))


@pytest.mark.parametrize(("model_type", "architecture", "config", "message"), REFUSED_MODELS, ids=lambda x: str(x)[:24])
def test_models_are_refused_with_the_reason(tmp_path, model_type, architecture, config, message):
    folder = write_config(tmp_path, model_type, architecture, **config)
    with pytest.raises(refusals.Refusal, match=message):
        refusals.check_model(model_config(folder), TokenSelectConfig())


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("llama", "LlamaForCausalLM"),
        ("mistral", "MistralForCausalLM"),
        ("mixtral", "MixtralForCausalLM"),
        ("qwen2", "Qwen2ForCausalLM"),
        ("qwen2_moe", "Qwen2MoeForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
        ("qwen3_moe", "Qwen3MoeForCausalLM"),
        ("gemma2", "Gemma2ForCausalLM"),
    ],
)
def test_served_models_pass(tmp_path, model_type, architecture):
    config = model_config(write_config(tmp_path, model_type, architecture))
    refusals.check_model(config, TokenSelectConfig())
    refusals.check_model(config, TokenSelectConfig(positions="compact"))


def test_compact_positions_need_plain_rope_and_a_window_within_the_trained_length(tmp_path):
    compact = TokenSelectConfig(positions="compact")
    scaled = write_config(
        tmp_path / "a", "llama", "LlamaForCausalLM", rope_scaling={"rope_type": "linear", "factor": 2.0}
    )
    with pytest.raises(refusals.Refusal, match="expected a plain RoPE"):
        refusals.check_model(model_config(scaled), compact)
    short = write_config(tmp_path / "b", "llama", "LlamaForCausalLM", max_position_embeddings=2048)
    with pytest.raises(
        refusals.Refusal, match="expected at most the trained length 2048 with compact positions, got 2816"
    ):
        refusals.check_model(model_config(short), compact)


def test_dense_layers_must_exist(llama):
    with pytest.raises(refusals.Refusal, match=r"dense_layers: expected layers below 2, got \[2\]"):
        refusals.check_model(model_config(llama), TokenSelectConfig(dense_layers=(0, 2)))


def test_other_devices_are_refused():
    args = SimpleNamespace(attention_backend="tokenselect", device="xpu")
    with pytest.raises(refusals.Refusal, match="device: expected None or 'cpu' or 'cuda', got 'xpu'"):
        refusals.check_server_args(args, TokenSelectConfig())


def gpu_args(**changes):
    graphs = {"prefill": SimpleNamespace(backend="breakable"), "decode": SimpleNamespace(backend="full")}
    graphs.update({name: SimpleNamespace(backend=backend) for name, backend in changes.items() if name in graphs})
    return SimpleNamespace(
        attention_backend="tokenselect",
        device="cuda",
        enable_lora=changes.get("enable_lora"),
        kv_cache_dtype=changes.get("kv_cache_dtype", "auto"),
        cuda_graph_config=SimpleNamespace(**graphs),
    )


REFUSED_WITH_A_GPU = [
    ({"prefill": "full"}, {}, "cuda_graph_backend_prefill: expected .* got 'full'"),
    ({"prefill": "tc_piecewise"}, {}, "cuda_graph_backend_prefill: expected .* got 'tc_piecewise'"),
    ({"decode": "breakable"}, {}, "cuda_graph_backend_decode: expected .* got 'breakable'"),
    ({"enable_lora": True}, {}, "enable_lora: expected False, got True"),
    ({"kv_cache_dtype": "fp8_e4m3"}, {"positions": "compact"}, "the model's type with compact positions on a GPU"),
    ({}, {"budget": 8193}, "budget: expected at most 8192 on a GPU, got 8193"),
    ({}, {"block": 96, "sub_block": 32}, "sub_block: expected what the kernels"),
    ({"prefill": "disabled"}, {"selector": "page"}, "cuda_graph_backend_decode: expected 'disabled', got 'full'"),
    ({"decode": "disabled"}, {"selector": "window"}, "cuda_graph_backend_prefill: expected 'disabled', got 'break"),
]


@pytest.mark.parametrize(("flags", "options", "message"), REFUSED_WITH_A_GPU, ids=str)
def test_what_cannot_go_with_a_gpu_is_refused_before_the_model_is_loaded(monkeypatch, flags, options, message):
    monkeypatch.setattr(compat, "untested_on_gpus", lambda: None)
    refusals.check_server_args(gpu_args(), TokenSelectConfig())
    with pytest.raises(refusals.Refusal, match=message):
        refusals.check_server_args(gpu_args(**flags), TokenSelectConfig(**options))


def test_what_has_no_kernels_is_bound_by_none_of_their_limits(monkeypatch):
    monkeypatch.setattr(compat, "untested_on_gpus", lambda: None)
    options = TokenSelectConfig(selector="page", budget=8193, block=96, sub_block=32)
    refusals.check_server_args(gpu_args(prefill="disabled", decode="disabled"), options)


def test_gpus_need_the_versions_that_were_tested(monkeypatch):
    monkeypatch.setattr(compat, "version", {"sglang": "0.5.17", "flashinfer-python": "0.7.2"}.get)
    with pytest.raises(refusals.Refusal, match="flashinfer-python: expected 0.6.15, got 0.7.2"):
        refusals.check_server_args(gpu_args(), TokenSelectConfig())


def test_a_cpu_server_beside_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = SimpleNamespace(attention_backend="tokenselect", device="cpu")
    with pytest.raises(refusals.Refusal, match="device: expected 'cuda', or CUDA_VISIBLE_DEVICES=''"):
        refusals.check_server_args(args, TokenSelectConfig())


H200, BF16, FP8 = (9, 0), torch.bfloat16, torch.float8_e4m3fn
LLAMA_8B = ModelShape(32, 32, 8, 128, BF16, BF16, 131072)
REFUSED_ON_GPUS = [
    ((8, 0), LLAMA_8B, {}, (), "GPU: expected compute capability 9.0"),
    (H200, replace(LLAMA_8B, head_dim=256), {}, (), "head_dim 64 or 128, got head_dim 256"),
    (H200, replace(LLAMA_8B, dtype=torch.float32), {}, (), "dtype: expected bfloat16 or float16"),
    (
        *(H200, replace(LLAMA_8B, dtype=torch.float16), {}, ()),
        "kv_cache_dtype: expected the model's torch.float16 or torch.float8_e4m3fn, got torch.bfloat16",
    ),
    (H200, replace(LLAMA_8B, kv_dtype=torch.float8_e5m2), {}, (), "or torch.float8_e4m3fn, got torch.float8_e5m2"),
    (
        *(H200, replace(LLAMA_8B, kv_dtype=FP8), {"positions": "compact"}, ()),
        "kv_cache_dtype: expected the model's type with compact positions on a GPU, got fp8_e4m3 .FlashInfer",
    ),
    (H200, replace(LLAMA_8B, num_layers=0), {"dense_layers": (0,)}, (), "dense_layers: expected a layer that"),
    (H200, LLAMA_8B, {"positions": "compact"}, (0,), "no sliding-window layers"),
]


@pytest.mark.parametrize(("capability", "shape", "options", "sliding", "message"), REFUSED_ON_GPUS, ids=str)
def test_what_gpus_do_not_serve_is_refused(capability, shape, options, sliding, message):
    with pytest.raises(refusals.Refusal, match=message):
        refusals.check_gpu(capability, shape, TokenSelectConfig(**options), sliding)


def test_the_rest_is_served_on_gpus():
    for shape in (LLAMA_8B, replace(LLAMA_8B, kv_dtype=FP8)):
        refusals.check_gpu(H200, shape, TokenSelectConfig(dense_layers=(0,)), sliding_layers=(1,))


def test_what_cpus_do_not_serve_is_refused():
    llama, moe, padded = (
        SimpleNamespace(
            hf_config=SimpleNamespace(architectures=[f"{name}ForCausalLM"], original_total_num_kv_heads=2),
            get_total_num_kv_heads=lambda heads=heads: heads,
        )
        for name, heads in (("Llama", 2), ("Qwen2Moe", 2), ("Llama", 4))
    )
    refusals.check_torch(llama, ())
    with pytest.raises(refusals.Refusal, match=r"no sliding-window layers on a CPU, got layers \[1\]"):
        refusals.check_torch(llama, {1})
    with pytest.raises(refusals.Refusal, match="not Qwen2MoeForCausalLM on a CPU"):
        refusals.check_torch(moe, ())
    with pytest.raises(refusals.Refusal, match="tp_size: expected a divisor of the 2 KV heads on a CPU, got one .* 4"):
        refusals.check_torch(padded, ())


def test_min_len_must_leave_requests_that_select(llama):
    with pytest.raises(refusals.Refusal, match="min_len: expected less than the context length of 4096, got 4096"):
        refusals.check_model(model_config(llama), TokenSelectConfig(min_len=4096))
    refusals.check_model(model_config(llama), TokenSelectConfig(min_len=4095))


@pytest.mark.parametrize(
    ("start", "end", "aligned"), [(0, 300, 256), (100, 300, 256), (256, 300, 300), (0, 100, 100), (0, 256, 256)]
)
def test_chunks_end_at_blocks(start, end, aligned):
    assert chunk_alignment.aligned_end(start, end, 128) == aligned
