"""Random training steps equal plain jax, or are refused by name: `random_programs` as a test.

The seeds are ranges: a new failure is met by mending its kind, not by another range.
"""

from __future__ import annotations

import pytest

from .random_programs import Outcome, children, run_seed, summary
from .random_steps import random_step


def check(outcome: Outcome) -> None:
    assert outcome.kind in ("ok", "refused"), str(outcome)


@pytest.mark.parametrize("seed", range(10))
def test_steps_equal_plain_jax(seed):
    check(run_seed(seed, pipelines=False))


@pytest.mark.parametrize("seed", range(5))
def test_pipelines_equal_plain_jax(seed):
    check(run_seed(seed, pipelines=True))


@pytest.mark.slow
@pytest.mark.parametrize("pipelines", [False, True])
def test_five_hundred_equal_plain_jax(pipelines):
    lines = list(children(list(range(500)), pipelines))
    assert not [line for line in lines if line.split()[1] in ("WRONG", "CRASH")], summary(lines)


def test_a_seed_is_one_program():
    first, again = random_step(11, True), random_step(11, True)
    assert first.words == again.words and first.request == again.request
    assert first.words != random_step(11, False).words


def test_a_wrong_number_is_told(monkeypatch):
    """What moves a parameter by a hundredth of its step too little is wrong."""
    import jax

    import meshwright as mw

    def nearly(step, **asked):
        def run(state, batch):
            new, told = jax.jit(step)(state, batch)
            less = jax.tree.map(
                lambda old, to: old + 0.99 * (to - old), state["params"], new["params"]
            )
            return {**new, "params": less}, told

        return run

    monkeypatch.setattr(mw, "parallelize", nearly)
    assert run_seed(3, pipelines=False).kind == "WRONG"


def test_refusals_are_counted_by_reason():
    lines = [f"{n} refused | batch of {n} ; where x | words" for n in (7, 9)] + ["1 ok | words"]
    counted = "3 programs: 1 ok, 2 refused, 0 WRONG, 0 CRASH"
    assert summary(lines).splitlines() == [counted, "    2  refused batch of #"]
