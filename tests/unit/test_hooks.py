# SPDX-License-Identifier: Apache-2.0
"""What the hooks rely on, in the SGLang that is installed, and how a difference is told."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.plugins import load_plugins

from sglang_tokenselect import compat, plugin
from sglang_tokenselect.patches import cpu_dispatch, decode_graphs, effort, install, kv_budget
from sglang_tokenselect.patches.hook import Hook

RUN_BATCH = "sglang.srt.managers.scheduler.Scheduler.run_batch"
TESTED_ON_GPUS = compat.release(compat.found_sglang()) == (0, 5, 17)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def loaded():
    load_plugins()


def observe(scheduler, batch, *args, **kwargs):
    pass


def hook(**changes):
    return replace(Hook(RUN_BATCH, "before", observe, ("self", "batch")), **changes)


def test_sglang_is_what_the_hooks_were_written_for():
    install.check()
    install.verify()
    assert len(install.hooks()) > 10


@pytest.mark.parametrize(
    "each",
    [*install.hooks(), *cpu_dispatch.HOOKS, *kv_budget.HOOKS, *(decode_graphs.HOOKS if TESTED_ON_GPUS else ())],
    ids=lambda each: each.target.rpartition("srt.")[2],
)
def test_each_hook_finds_what_it_relies_on(each):
    """Those for GPUs too: what they wrap can be looked at on a CPU."""
    assert each.find_faults() == []


@pytest.mark.skipif(TESTED_ON_GPUS, reason="this is what they were written for")
def test_hooks_of_decode_graphs_refuse_other_versions():
    faults = [fault for each in decode_graphs.HOOKS for fault in each.find_faults()]
    assert any("_set_capture_lora_variant: expected to exist" in fault for fault in faults)
    assert any("capture_one_shape: expected parameters (self, size, " in fault for fault in faults)


def renamed(self, work, pp_proxy_tensors=None):
    pass


def longer(self, recv_reqs, priority):
    pass


def test_a_changed_signature_is_refused_with_the_version_before_anything_is_registered(monkeypatch):
    monkeypatch.setattr(Scheduler, "run_batch", renamed)
    message = (
        rf"hooks: SGLang {re.escape(compat.found_sglang())} \(expected >=0.5.17,<0.5.24\) is not what they were "
        rf"written for:\n  patches/effort.py: {RUN_BATCH}: expected parameters \(self, batch, ...\), "
        r"got \(self, work, pp_proxy_tensors\)$"
    )
    with pytest.raises(RuntimeError, match=message):
        install.verify()
    with pytest.raises(RuntimeError, match=message):
        register_anew(monkeypatch)


def register_anew(monkeypatch):
    """`plugin.register` as in a process where nothing is registered, which must register nothing."""
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.plugins.hook_registry import HookRegistry

    monkeypatch.setattr(attention_registry, "ATTENTION_BACKENDS", backends := {})
    monkeypatch.setattr(HookRegistry, "_hooks", {})
    try:
        plugin.register()
    finally:
        assert backends == {} and HookRegistry._hooks == {}


def test_a_parameter_more_is_refused_where_the_function_takes_no_more(monkeypatch):
    monkeypatch.setattr(Scheduler, "process_input_requests", longer)
    with pytest.raises(RuntimeError, match=r"expected parameters \(self, recv_reqs\), got \(self, recv_reqs, priority"):
        install.check()


def test_all_faults_are_told_at_once(monkeypatch):
    monkeypatch.delattr(Scheduler, "process_input_requests")
    monkeypatch.setattr(Scheduler, "run_batch", renamed)
    with pytest.raises(RuntimeError) as raised:
        install.check()
    assert len(str(raised.value).splitlines()) == 3
    assert "process_input_requests: expected a function, got none" in str(raised.value)


@pytest.mark.parametrize(
    ("uses", "is_there"),
    [
        (f"{effort._SCHEDULER}.tp_worker", True),  # set in a method
        (f"{effort._RECEIVER}.server_args", True),  # a slot
        ("sglang.srt.managers.io_struct.GetInternalStateReqOutput.internal_state", True),
        ("sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator.gpu_id", True),  # a field
        (f"{effort._SCHEDULER}.no_such_attribute", False),
        ("sglang.srt.managers.no_such_module.function", False),
        ("sglang.srt.utils.common.no_such_function", False),
    ],
)
def test_what_else_a_hook_uses_must_exist(uses, is_there):
    faults = [] if is_there else [f"patches/{hook().file[8:]}: {uses}: expected to exist, got none"]
    assert hook(uses=(uses,)).find_faults() == faults


def test_a_hook_that_is_not_applied_is_named(monkeypatch):
    monkeypatch.setattr(effort, "HOOKS", (*effort.HOOKS, hook()))
    with pytest.raises(RuntimeError, match=rf"hooks: expected all applied in SGLang .*, got none on {RUN_BATCH};"):
        install.verify()


def test_a_target_that_does_not_exist_is_not_applied():
    assert not hook(target="sglang.srt.server_args.ServerArgs.no_such_method").is_applied()


def test_checking_imports_nothing_that_sglang_would_not():
    """SGLang imports the targets' modules when it applies the hooks."""
    code = (
        "import pkgutil, sys; from sglang_tokenselect.patches import install\n"
        "targets = [pkgutil.resolve_name(each.target) for each in install.hooks()]\n"
        "before = set(sys.modules); install.check(); print(set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_hooks_for_gpus_are_left_out_where_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(compat, "untested_on_gpus", lambda: None)
    assert set(decode_graphs.HOOKS) < set(install.hooks())
    monkeypatch.setattr(compat, "untested_on_gpus", lambda: ("sglang", "0.5.17", "0.5.23"))
    assert not set(decode_graphs.HOOKS) & set(install.hooks())


def test_a_package_that_is_missing_is_told_as_none(monkeypatch):
    monkeypatch.setattr(compat, "find_version", {"sglang": "0.5.17"}.get)
    assert compat.untested_on_gpus() == ("flashinfer-python", "0.6.15", "none")
