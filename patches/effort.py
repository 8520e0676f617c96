# SPDX-License-Identifier: Apache-2.0
"""The scheduler's loop: the load of each step is seen, and the effort level set between two steps.

Symptom without it: the budget of decode would be the same whether the server is idle or overrun.
Seams, met by the normal and by the overlap loop alike: `Scheduler.run_batch`, right before each forward;
`_pull_raw_reqs`, where the first rank has received the requests of a turn and they are about to be broadcast; and
`process_input_requests`, where every rank begins with what was broadcast, before it forms the next batch.
May go when SGLang tells plugins of its scheduler's steps, and lets them broadcast.
"""

from __future__ import annotations

from typing import Any

from sglang_tokenselect.plugin import BACKEND

from .hook import Hook

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_RECEIVER = "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver"
_AGENT = "_tokenselect_agent"

# SGLang's receivers take no new attributes. A process has one scheduler, which lives as long as it.
_agent_of_receiver: dict[int, Any] = {}


def _add_agent(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    if scheduler.server_args.attention_backend != BACKEND:
        return
    from sglang.srt.distributed.parallel_state import get_tensor_model_parallel_rank

    from sglang_tokenselect.scheduler_agent import SchedulerAgent

    runner = scheduler.tp_worker.model_runner.attn_backend.runner
    agent = SchedulerAgent(scheduler, runner, is_leader=get_tensor_model_parallel_rank() == 0)
    setattr(scheduler, _AGENT, agent)
    _agent_of_receiver[id(scheduler.request_receiver)] = agent


def _observe(scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    if (agent := getattr(scheduler, _AGENT, None)) is not None:
        agent.observe(batch)


def _deliver(received: list[Any] | None, receiver: Any) -> None:
    if received is not None and (agent := _agent_of_receiver.get(id(receiver))) is not None:
        agent.deliver(received)


def _accept(scheduler: Any, received: list[Any]) -> tuple[tuple, dict] | None:
    if not received or (agent := getattr(scheduler, _AGENT, None)) is None:
        return None
    others = agent.accept(received)
    return None if others is None else ((scheduler, others), {})


HOOKS = (
    Hook(
        f"{_SCHEDULER}.__init__",
        "after",
        _add_agent,
        ("self", "server_args"),
        (f"{_SCHEDULER}.tp_worker", f"{_SCHEDULER}.request_receiver"),
    ),
    Hook(f"{_SCHEDULER}.run_batch", "before", _observe, ("self", "batch")),
    Hook(f"{_RECEIVER}._pull_raw_reqs", "after", _deliver, ("self",)),
    Hook(f"{_SCHEDULER}.process_input_requests", "before", _accept, ("self", "recv_reqs")),
)
