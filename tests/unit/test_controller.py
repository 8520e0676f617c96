# SPDX-License-Identifier: Apache-2.0
"""The controller before simulated servers: holds what can be held, does not flap, lets the guard have the last word."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from itertools import groupby
from statistics import median
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_tokenselect import controller as module
from sglang_tokenselect.config import ConfigError, TokenSelectConfig
from sglang_tokenselect.controller import HOLD, WINDOW, Controller, Load
from sglang_tokenselect.effort import LOWEST_LEVEL, effort_at, highest_level
from sglang_tokenselect.policies import PATIENCE, LoadPolicy, SloPolicy


def controller(**options):
    return Controller(TokenSelectConfig(**options))


def slo(target_ms=20.0, **options):
    return controller(policy="slo", itl_target_ms=target_ms, **options)


def load(running=4, wait=0.0, kv=0.5, gap=0.01):
    return Load(running, oldest_wait=wait, kv_usage=kv, gap=gap)


def serve(control, running, itl=lambda level, running: 0.01):
    """Decode steps with so many requests each, taking `itl` seconds: the levels and the seconds of the steps."""
    levels, gaps = [], [None]
    for num_running in running:
        control.observe(load(num_running, gap=gaps[-1]))
        levels.append(control.effort.level)
        gaps.append(itl(control.effort.level, num_running))
    return levels, gaps[1:]


def changes(levels):
    return sum(a != b for a, b in zip(levels, levels[1:], strict=False))


def share_above(target, gaps):
    return sum(gap > target for gap in gaps) / len(gaps)


def note(control, share, times=4):
    for _ in range(times):
        control.note_mass(share)


@pytest.mark.parametrize("level", range(LOWEST_LEVEL + 1))
def test_fixed_stays_at_its_level(level):
    control = controller(level=level)
    assert control.effort == effort_at(control.config, level)
    assert control.observe(load(100, wait=9.0, kv=1.0)) is None
    assert control.rest() is None


@pytest.mark.parametrize(
    ("seen", "level"),
    [(load(n), level) for n, level in ((1, 0), (7, 0), (8, 1), (16, 2), (31, 3), (32, 4), (500, 4))]
    + [(load(wait=s), level) for s, level in ((0.49, 0), (0.5, 1), (1.0, 2), (2.0, 4), (60.0, 4))]
    + [(load(kv=share), level) for share, level in ((0.8, 0), (0.85, 1), (0.9, 2), (0.97, 3), (0.98, 4), (1.0, 4))]
    + [(load(8, wait=1.6, kv=0.9), 3)],
    ids=str,
)
def test_load_goes_at_once_to_the_level_that_the_greatest_pressure_reaches(seen, level):
    control = controller(policy="load")
    assert control.observe(seen) == (effort_at(control.config, level) if level else None)
    assert control.effort.level == level


def test_load_comes_back_one_level_per_patience():
    levels, _ = serve(controller(policy="load"), [32] + [1] * 200)
    assert levels[: 4 * PATIENCE + 1] == [4] * PATIENCE + [3] * PATIENCE + [2] * PATIENCE + [1] * PATIENCE + [0]
    assert changes(levels) == 4


def test_load_is_not_moved_by_noise_within_the_band():
    rng = random.Random(0)
    for most in (15, 23):
        levels, _ = serve(controller(policy="load"), [16] + [rng.randint(12, most) for _ in range(3000)])
        assert set(levels) == {2}


def test_load_follows_a_ramp_up_and_down_once():
    ramp = [step // 50 for step in range(2000)]
    levels, _ = serve(controller(policy="load"), ramp + ramp[::-1])
    assert levels[:2000] == sorted(levels[:2000]) and levels[2000:] == sorted(levels[2000:], reverse=True)
    assert (max(levels), levels[-1], changes(levels)) == (4, 0, 8)


def test_load_changes_five_times_per_burst_and_not_at_all_in_fast_oscillation():
    levels, _ = serve(controller(policy="load"), ([1] * 495 + [32] * 5) * 10 + [1] * 495)
    assert changes(levels) == 10 * 5 and levels[-1] == 0
    levels, _ = serve(controller(policy="load"), ([24] * 20 + [1] * (PATIENCE - 1)) * 100)
    assert set(levels) == {3}


LADDER = (0.040, 0.030, 0.020, 0.015, 0.008)


@pytest.mark.parametrize(("target_ms", "held"), [(50, 0), (41, 0), (32, 1), (25, 2), (17, 3), (9, 4)])
def test_slo_holds_a_target_with_the_best_level_that_can(target_ms, held):
    control = slo(target_ms)
    levels, gaps = serve(control, [8] * 20_000, lambda level, _: LADDER[level])
    assert share_above(target_ms / 1000, gaps[10_000:]) < 0.025
    assert sum(level == held for level in levels[10_000:]) > 0.9 * 10_000


@pytest.mark.parametrize("cliff", range(LOWEST_LEVEL))
@pytest.mark.parametrize("above", [1.1, 1.4, 5.0])
def test_slo_between_far_above_and_far_below_tries_ever_more_rarely(cliff, above):
    levels, gaps = serve(slo(20.0), [8] * 20_000, lambda level, _: 0.020 * (above if level <= cliff else 0.3))
    # Tries after 2, 4 ... 64, 64 ... windows: 25 in all, each a raise and a fall, which may take a second raise.
    assert changes(levels) <= 3 * 25
    assert share_above(0.020, gaps) < 0.05
    assert share_above(0.020, gaps[10_000:]) < 0.02


def test_slo_judges_window_by_window_and_skips_the_gaps_of_steps_in_flight():
    control = slo(20.0)
    low, middle = (0.016, 16, 3), (0.018, 16, 3)
    first = (0.025, 16, 1), (0.031, 18, 3), (0.020, 18, 3)
    for gap, steps, level in (*first, low, middle, low, (0.016, 16, 2)):
        results = [control.observe(load(gap=gap)) for _ in range(steps)]
        assert results[:-1] == [None] * (steps - 1)
        assert (control.itl, control.effort.level) == (gap, level)


def test_stalls_of_prefills_do_not_move_slo():
    rng = random.Random(0)
    levels, _ = serve(slo(20.0), [8] * 5000, lambda level, _: 0.5 if rng.random() < 0.1 else 0.018)
    assert set(levels) == {0}


def test_slo_in_noise_stays_below_its_target():
    rng = random.Random(0)
    levels, gaps = serve(slo(25.0), [8] * 20_000, lambda level, _: LADDER[level] * rng.lognormvariate(0, 0.2))
    windows = [median(gaps[i : i + WINDOW]) for i in range(0, 20_000, WINDOW)]
    assert share_above(0.025, windows) < 0.05 and changes(levels) < 3 * 25
    assert sum(level == 2 for level in levels) > 0.9 * 20_000


def rushed(level, running):
    return LADDER[level] * running / 8


def test_slo_comes_back_soon_after_a_rush_however_long():
    control = slo(50.0)
    during, gaps = serve(control, [16] * 20_000, rushed)
    after, _ = serve(control, [8] * 400, rushed)
    assert share_above(0.050, gaps) < 0.05 and 1 in during[10_000:]  # It tried, and learnt to wait for 64 windows.
    soon = WINDOW + 2 * (2 * WINDOW + 2)  # The window under way; then two windows and two skipped gaps per level.
    assert set(after[soon + 1 :]) == {0}


def test_slo_in_oscillating_load_goes_there_and_back_once_per_period():
    levels, gaps = serve(slo(50.0), ([8] * 1000 + [24] * 1000) * 10, rushed)
    assert changes(levels) <= 10 * 5  # From 0 to 2 and 3, back over 2 and 1.
    assert share_above(0.050, gaps) < 10 * 3 * WINDOW / 20_000


def waits(control, steps, itl):
    """Windows that each stay away from level 0 took; the last of them may be cut off, and is left out."""
    levels, _ = serve(control, [8] * steps, itl)
    return [round(len(list(away)) / WINDOW) for is_best, away in groupby(levels, lambda x: x == 0) if not is_best][:-1]


def failing(level, _):
    return 0.01 if level else 0.025


def failing_after(windows):
    at_best = 0

    def itl(level, _):
        nonlocal at_best
        at_best = 0 if level else at_best + 1
        return failing(level, _) if at_best > windows * WINDOW + 2 else 0.01

    return itl


def test_slo_waits_longer_for_a_level_that_fails_and_less_for_one_that_held():
    control = slo(20.0)
    assert waits(control, 5000, failing) == [2, 4, 8, 16, 32, 64, 64, 64]
    serve(control, [8] * 2 * 65 * WINDOW)
    assert waits(control, 2000, failing) == [32, 64]


def test_slo_takes_a_level_for_failed_that_holds_a_few_windows_or_less_than_its_patience():
    assert waits(slo(20.0), 1200, failing_after(2)) == [2, 4, 8, 16]
    control = slo(20.0)
    serve(control, [8] * 3000, failing)
    assert waits(control, 4000, failing_after(10))[1:] == [64, 64, 64]


def test_a_miss_after_a_rest_is_no_failed_raise():
    control = slo(20.0)
    serve(control, [8] * (3 * WINDOW + 4), failing)
    assert control.rest() is None
    assert waits(control, 200, failing) == [2, 4]


def test_policies_ask_for_no_level_beyond_the_cheapest():
    config = TokenSelectConfig(itl_target_ms=1.0, load_wait_ms=5e-324)
    assert SloPolicy(config).choose(LOWEST_LEVEL, load(), 0.1) == LOWEST_LEVEL
    assert LoadPolicy(config).choose(0, load(wait=9.0), None) == LOWEST_LEVEL


def test_an_idle_server_is_at_level_0_and_forgets_its_window():
    control = slo(5.0)
    serve(control, [8] * 30)
    assert control.rest() == effort_at(control.config, 0) and control.rest() is None
    serve(control, [8] * 10)
    assert control.rest() is None
    serve(control, [8] * WINDOW)
    assert control.effort.level == 0 and control.itl is None
    control.observe(load())
    assert control.effort.level == 2 and control.itl == 0.01
    control = controller(policy="load")
    control.observe(load(32))
    assert control.rest().level == 0


def test_itl_is_the_median_of_full_windows_without_missing_gaps():
    control = controller()
    for gap in (None, *range(WINDOW - 1), None):
        control.observe(load(gap=gap))
        assert control.itl is None
    control.observe(load(gap=1000))
    assert control.itl == median([*range(WINDOW - 1), 1000])
    serve(control, [4] * 10)
    control.configure({"level": 1})
    serve(control, [4] * (WINDOW + 2), lambda *_: 2.0)
    assert control.itl > 2.0
    control.observe(load(gap=2.0))
    assert control.itl == 2.0


def test_mass_is_a_running_mean_and_begins_anew_with_the_effort():
    control = controller(policy="load")
    assert control.mass is None
    note(control, 0.0, 4)
    note(control, 1.0, 4)
    assert control.mass == pytest.approx(0.5)
    note(control, 1.0, 1)
    assert control.mass == pytest.approx(0.5 + 0.5 / 8)
    control.observe(load(32))
    assert control.mass is None
    note(control, 0.25, 1)
    assert control.mass == 0.25


def test_the_guard_refuses_then_holds_then_allows_level_by_level():
    control = controller(level=3, min_mass=0.5)
    note(control, 0.4, 3)
    assert control.observe(load()) is None
    note(control, 0.4, 1)
    assert control.observe(load()) == effort_at(control.config, 2) and control.mass is None
    note(control, 0.4)
    serve(control, [4] * (HOLD - 1))
    note(control, 0.6)
    assert control.cheapest == 1
    for _ in range(3):
        control.rest()
    levels, _ = serve(control, [4] * (1 + 3 * HOLD))
    assert levels == [1] + [2] * HOLD + [3] * 2 * HOLD and control.cheapest == LOWEST_LEVEL


def test_an_objection_is_held_from_the_last_one_on():
    control = controller(level=1, min_mass=0.5)
    note(control, 0.1)
    serve(control, [4] * 3000)
    note(control, 0.1)
    assert serve(control, [4] * (HOLD + 1))[0] == [0] * HOLD + [1]


@pytest.mark.parametrize(("max_budget", "budgets"), [(None, [2048]), (5000, [2048, 4096, 5000])])
def test_the_guard_boosts_up_to_the_largest_budget(max_budget, budgets):
    control = controller(policy="load", max_budget=max_budget, min_mass=0.5)
    seen = []
    for _ in range(5):
        seen.append(control.effort.budget)
        note(control, 0.4)
        control.observe(load(32))
    assert list(dict.fromkeys(seen)) == budgets
    assert control.cheapest == control.effort.level == highest_level(control.config)
    control.rest()
    assert control.effort.budget == budgets[-1]


def test_only_the_guard_goes_beyond_level_0():
    control = slo(20.0, max_budget=9000, min_mass=0.5)
    note(control, 0.4)
    assert set(serve(control, [4] * 500)[0]) == {-1}


def test_what_the_guard_refuses_does_not_pile_up_in_the_policy():
    control = controller(policy="load", min_mass=0.5)
    serve(control, [16] * 3)
    note(control, 0.4)
    levels, _ = serve(control, [32] * 100 + [1] * PATIENCE)
    assert levels == [1] * (99 + PATIENCE) + [0]


def test_another_min_mass_clears_the_refusals_and_other_options_do_not():
    for change, cheapest in (({"min_mass": 0.4}, 4), ({"min_mass": None}, 4), ({"min_mass": 0.5, "level": 2}, 1)):
        control = controller(level=2, min_mass=0.5)
        note(control, 0.1)
        control.configure(change)
        assert control.cheapest == 1
        control.observe(load())
        assert control.cheapest == cheapest and control.effort.level == min(2, cheapest)


@pytest.mark.parametrize(
    "bad",
    [{"budget": 5}, {"max_budget": 9000}, {"lvel": 1}, {"level": 5}, {"level": -1}, {"level": True}, {"level": 2.0}]
    + [{"policy": "slo"}, {"policy": None}, {"load_requests": 0}, {"load_wait_ms": 0.0}, {"itl_target_ms": "fast"}]
    + [{"min_budget": 2049}, {"min_mass": 1.5}, {"level": 1, "min_mass": 0.0}, {"level": 1, "theta": 0.5}],
    ids=str,
)
def test_configure_refuses_and_changes_nothing(bad):
    control = controller()
    config = control.config
    with pytest.raises(ConfigError, match="expected"):
        control.configure(bad)
    assert control.config is config
    assert control.observe(load()) is None


def test_configure_takes_effect_at_the_next_step_from_the_present_level():
    control = controller(level=3)
    assert control.configure({"policy": "load"}) is control.config
    assert control.effort.level == 3 and control.observe(load(1)) is None
    assert control.configure({"min_budget": 2000}).policy == "load"
    assert control.observe(load(1)) == effort_at(control.config, 3) and control.effort.budget == 2000
    control.configure({"policy": "fixed", "level": 1})
    assert control.rest() == effort_at(control.config, 1)


def test_configure_from_threads_loses_nothing(monkeypatch):
    def slow_replace(config, **changes):
        time.sleep(0.002)  # The others get to read the configuration that this thread is about to replace.
        return replace(config, **changes)

    monkeypatch.setattr(module, "replace", slow_replace)
    control = controller(level=1)
    for i in range(1, 11):
        options = {"load_requests": i, "load_wait_ms": float(i), "itl_target_ms": float(i), "min_budget": i + 1024}
        threads = [threading.Thread(target=control.configure, args=({name: x},)) for name, x in options.items()]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            control.observe(load())
        assert control.config == replace(TokenSelectConfig(level=1), **options)
        control.observe(load())
        assert control.effort == effort_at(control.config, 1)


SHARE = st.floats(0, 1)
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "policy": st.sampled_from(["fixed", "load", "slo", "none"]),
        "level": st.integers(-1, 5),
        "itl_target_ms": st.none() | st.floats(0, 50),
        "load_requests": st.integers(0, 40),
        "load_wait_ms": st.floats(0, 100),
        "min_budget": st.integers(0, 1100),
        "min_mass": st.none() | SHARE,
        "budget": st.just(1),
    },
)
LOADS = st.builds(Load, st.integers(1, 64), st.floats(0, 9), SHARE, st.none() | st.floats(0, 0.1))
CALLS = st.one_of(
    st.tuples(st.just("observe"), LOADS, st.integers(1, 60)),
    st.tuples(st.just("note_mass"), SHARE, st.integers(1, 6)),
    st.tuples(st.just("configure"), CHANGES, st.just(1)),
    st.just(("rest", None, 2)),
)
CONFIGS = st.builds(
    TokenSelectConfig,
    budget=st.just(1000),
    max_budget=st.none() | st.integers(1000, 9000),
    policy=st.sampled_from(["fixed", "load", "slo"]),
    itl_target_ms=st.floats(1, 50),
    min_mass=st.none() | st.just(0.5),
)


def replayed(config, calls):
    control = Controller(config)
    for name, argument, times in calls:
        for _ in range(times):
            before, config = control.effort, control.config
            try:
                result = getattr(control, name)(*([] if argument is None else [argument]))
            except ConfigError:
                assert control.config is config
                continue
            if name in ("observe", "rest"):
                check(control)
                assert result == (None if control.effort == before else control.effort)
            yield control.effort, control.mass, control.itl, control.cheapest


def check(control):
    config, effort = control.config, control.effort
    assert highest_level(config) <= effort.level <= min(control.cheapest, LOWEST_LEVEL)
    assert config.min_budget <= effort.budget <= config.largest_budget
    assert effort == effort_at(config, effort.level)
    assert effort.level >= min(0, control.cheapest)


@settings(max_examples=200, deadline=None)
@given(CONFIGS, st.lists(CALLS, max_size=25))
def test_bounds_are_kept_whatever_is_seen_and_the_same_calls_give_the_same_efforts(config, calls):
    with mock.patch.object(module, "HOLD", 30):
        assert list(replayed(config, calls)) == list(replayed(config, calls))
