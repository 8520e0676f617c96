# SPDX-License-Identifier: Apache-2.0
"""`sglang-tokenselect doctor` with the SGLang that is installed: each section, what it refuses, and the exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import write_config
from sglang.srt.managers.scheduler import Scheduler

from sglang_tokenselect import cli, compat, refusals
from sglang_tokenselect.doctor import command, gpus, modules, plugins, versions
from sglang_tokenselect.doctor.planned import PlannedServer
from sglang_tokenselect.doctor.report import Section, fill, starts, to_json, to_lines
from sglang_tokenselect.patches import install

IS_FIRST = compat.release(compat.found_sglang()) == (0, 5, 17)
CPU = ("--device", "cpu", "--skip-tokenizer-init")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(write_config(tmp_path_factory.mktemp("llama"), "llama", "LlamaForCausalLM"))


def examine(model, *flags):
    return command.examine(model, flags)


def test_what_a_cpu_serves_has_no_problems(llama):
    sections = examine(llama, *CPU, "--tokenselect-budget", "64")
    assert [section.problems for section in sections.values()] == [[]] * 7
    assert sections["versions"].facts["sglang"] == compat.found_sglang()
    assert sections["plugins"].facts["backend registered"] == "yes"
    assert len(sections["hooks"].facts) == len(install.hooks())
    assert set(sections["hooks"].facts.values()) == {"fits, applied"}
    assert sections["server"].facts["options beside the defaults"] == ["budget=64"]


def test_all_refusals_are_told_not_only_the_first(llama):
    flags = (*CPU, "--page-size", "16", "--enable-mixed-chunk", "--tokenselect-dense-layers", "7")
    flags += ("--chunked-prefill-size", "1000")
    problems = examine(llama, *flags)["server"].problems
    names = [problem.removeprefix("tokenselect: ").partition(":")[0] for problem in problems]
    assert names == ["page_size", "enable_mixed_chunk", "chunked_prefill_size", "dense_layers"]


def test_the_rules_are_those_of_a_server(llama):
    planned = PlannedServer.read(llama, (*CPU, "--enable-mixed-chunk"))
    [told] = refusals.find_refused_flags(planned.server_args, planned.config)
    with pytest.raises(refusals.Refusal) as raised:
        refusals.check_server_args(planned.server_args, planned.config)
    assert str(raised.value) == str(told)


def test_a_model_that_is_not_served_is_told(tmp_path):
    model = write_config(tmp_path, "gemma", "GemmaForCausalLM")
    [problem] = examine(str(model), *CPU)["server"].problems
    assert "model: expected one of LlamaForCausalLM" in problem
    model = write_config(tmp_path / "moe", "qwen2_moe", "Qwen2MoeForCausalLM")
    [problem] = examine(str(model), *CPU)["server"].problems
    assert "model: expected not Qwen2MoeForCausalLM on a CPU" in problem


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--no-such-flag",), "unrecognized arguments: --no-such-flag"),
        (("--page-size", "big"), "argument --page-size: invalid int value: 'big'"),
        (("--tokenselect-block", "100"), "sub_block: expected a divisor of block=100"),
        (("--tokenselect-budget", "-1"), "budget"),
        (("--config", "file.yaml"), "--config: expected the flags that it holds, got file.yaml"),
    ],
)
def test_flags_that_cannot_be_read_are_a_problem_not_the_end(llama, flags, said):
    sections = examine(llama, *CPU, *flags)
    assert said in "".join(sections["server"].problems)
    assert list(sections) == ["versions", "gpus", "plugins", "hooks", "server"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a plan for a GPU that is not there")
def test_a_gpu_is_planned_for_on_a_cpu(llama):
    flags = ("--device", "cuda", "--dtype", "bfloat16", "--cuda-graph-max-bs-decode", "16", "--skip-tokenizer-init")
    sections = examine(llama, *flags, "--tokenselect-cache-requests", "100")
    told = sections["server"].problems
    if not IS_FIRST:
        assert any("sglang: expected 0.5.17" in problem for problem in told)
        return
    assert told == ["GPUs: expected 1 for --device cuda and --tp-size 1, got 0 on this machine"]
    memory = sections["memory"]
    assert memory.problems == []
    assert memory.facts["--tokenselect-cache-requests"].startswith("50 instead of 100 saves")
    assert memory.facts["decode CUDA graphs"].startswith("of up to 16 requests")


@pytest.mark.skipif(torch.cuda.is_available() or not IS_FIRST, reason="FlashInfer's names of modules, on a CPU")
@pytest.mark.parametrize(
    ("options", "endings"),
    [
        ((), ["use_logits_cap_False_f16qk_False", "f16qk_False_sm90", "posenc_0_use_swa_False_use_logits_cap_False"]),
        (("--tokenselect-positions", "compact"), ["posenc_1_use_swa_False_use_logits_cap_False_f16qk_False"]),
        (("--tokenselect-selector", "page"), None),
    ],
)
def test_the_modules_of_flashinfer_are_named(llama, options, endings, monkeypatch, tmp_path):
    from flashinfer.jit import env

    monkeypatch.setattr(env, "FLASHINFER_JIT_DIR", tmp_path)
    planned = PlannedServer.read(llama, ("--device", "cuda", "--dtype", "bfloat16", "--skip-tokenizer-init", *options))
    found = modules.examine(planned).facts
    if endings is None:
        assert found == {"FlashInfer": "not used: PyTorch attends"}
        return
    names = found[modules.TO_COMPILE]
    assert len(names) == len(endings) and all(map(str.endswith, names, endings))
    (tmp_path / names[0]).mkdir()
    (tmp_path / names[0] / f"{names[0]}.so").touch()
    assert modules.examine(planned).facts[modules.COMPILED] == names[:1]


def test_a_section_that_fails_leaves_the_others(monkeypatch):
    monkeypatch.setattr(versions, "_find_driver", lambda: 1 / 0)
    sections = examine(None)
    assert sections["versions"].problems == ["ZeroDivisionError: division by zero"]
    assert sections["hooks"].facts
    assert not starts([*sections.values()])


def renamed(self, work):
    pass


def test_a_hook_that_does_not_fit_is_told(monkeypatch):
    monkeypatch.setattr(Scheduler, "run_batch", renamed)
    section = examine(None)["hooks"]
    assert section.facts["managers.scheduler.Scheduler.run_batch"] == "does not fit, not applied"
    assert "expected parameters (self, batch, ...), got (self, work)" in section.problems[0]
    assert section.problems[1].endswith("expected to be applied, got no wrapper of ours")


def test_a_version_out_of_range_is_told(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: "0.5.99")
    [problem] = fill(versions.examine).problems
    assert "sglang: expected >=0.5.17,<0.5.24, got 0.5.99" in problem


def test_entry_points_that_are_missing_are_told(monkeypatch):
    monkeypatch.setattr(plugins, "GROUPS", {"sglang.srt.plugins": "nobody"})
    [problem] = fill(plugins.examine).problems
    assert problem.startswith("sglang.srt.plugins: expected the entry point nobody, got none")


def test_gpus_are_named_where_there_are_some(monkeypatch):
    from types import SimpleNamespace

    found = SimpleNamespace(name="H", major=9, minor=0, uuid="1-2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (2**30, 2**31))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: one < other)
    facts = fill(gpus.examine).facts
    assert facts["cuda:1"] == "H, compute capability 9.0, 1.0 of 2.0 GiB free"
    assert facts["cuda:0 - cuda:1"].startswith("no P2P, NVLink not told (")


def test_the_report_as_text_and_as_json():
    sections = {"a": Section({"x": None, "long": ["1", "2"], "none": []}), "b": Section({}, ["broken"])}
    assert to_lines(sections) == [
        *("[a]", "  x     none", "  long  1", "        2", "  none  none"),
        *("[b]", "  ! broken", "Problems, each marked with !: 1. A server would not start."),
    ]
    assert to_lines({"a": sections["a"]})[-1] == "No problems found."
    told = to_json(sections)
    assert told["starts"] is False and told["b"] == {"facts": {}, "problems": ["broken"]}


def test_the_command_takes_flags_behind_two_dashes():
    args = cli.build_parser().parse_args(["doctor", "--json", "--model-path", "M", "--", "--tp-size", "2"])
    assert (args.model_path, args.json, args.server_flags) == ("M", True, ["--tp-size", "2"])


def doctor(*argv, **env):
    command = [sys.executable, "-m", "sglang_tokenselect.cli", "doctor", "--json", *argv]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout)


def test_the_command_prints_json_and_tells_by_its_code(llama):
    code, told = doctor("--model-path", llama, "--", *CPU)
    assert (code, told["starts"]) == (0, True)


def test_a_plugin_that_is_filtered_out_is_told(llama):
    code, told = doctor("--model-path", llama, "--", *CPU, SGLANG_PLUGINS="another")
    assert (code, told["starts"]) == (1, False)
    assert told["plugins"]["facts"]["backend registered"] == "no"
    assert told["plugins"]["facts"]["SGLANG_PLUGINS"] == "another"
    assert "invalid choice: 'tokenselect'" in told["server"]["problems"][0]


def test_the_plugins_error_is_told_where_sglang_only_logs_it(tmp_path):
    """A version out of range, as the metadata of a package on the path says."""
    folder = tmp_path / "sglang-9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 9.9\n")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    code, told = doctor(PYTHONPATH=path)
    assert code == 1
    assert "expected >=0.5.17,<0.5.24, got 9.9" in told["plugins"]["problems"][0]
