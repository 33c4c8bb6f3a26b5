"""Processes of one run that are not alike are refused before their first step, with values; none waits for long."""

from __future__ import annotations

import socket
import time

import pytest

from meshwright.api import plan as make_plan
from meshwright.backends.runtime.agreement import _by_process, decisions
from meshwright.backends.xla.agreement import arguments, described, software
from meshwright.ir.codec import load_plan, save_plan
from meshwright.planner.request import Request
from meshwright.recipe import make

from .processes import finish, free_address, start

JOIN = """
import os, sys
import meshwright as mw

mw.emulate(1)
mw.connect({address}, {count}, int(os.environ["JAX_PROCESS_ID"]))
print("joined")
"""


def joining(
    folder,
    count: int,
    numbers: list[int],
    address: str | None = None,
    deadline: float = 4,
    own=None,
):
    """How processes of these numbers end that join a run of so many, and how long it took."""
    folder.mkdir(exist_ok=True)
    (folder / "join.py").write_text(
        JOIN.format(address=repr(address or free_address()), count=count)
    )
    wanted = {
        k: {
            "JAX_PROCESS_ID": str(number),
            "MESHWRIGHT_DEADLINE": str(deadline),
            **(own or {}).get(k, {}),
        }
        for k, number in enumerate(numbers)
    }
    begin = time.monotonic()
    ends = finish(start(["join.py"], len(numbers), folder, wanted), folder)
    return ends, time.monotonic() - begin


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("agreement")
    recipe = {"model": "gpt-tiny", "layers": 1}
    made = make(recipe)
    request = Request(mesh=(2,), microbatches=1, recompute="none", time_limit=20)
    found = make_plan(made.step, *made.args, cluster="2xcpu", request=request, donate_argnums=0)
    save_plan(found.model_copy(update={"recipe": recipe}), place / "p.json")
    return place


# ---------------------------------------------------------------- joining


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_alone_ends_at_the_deadline(tmp_path, number):
    [(code, out, err)], seconds = joining(tmp_path, 2, [number])
    assert code == 7 and not out, err
    assert f"process {number} of 2 found no others." in err and "waited 4 s" in err
    assert seconds < 30


def test_a_port_in_use_ends_both_sides(tmp_path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        ends, seconds = joining(tmp_path, 2, [0, 1], f"127.0.0.1:{taken.getsockname()[1]}")
    assert [code for code, _, _ in ends] == [7, 7], ends
    assert "cannot listen at 127.0.0.1:" in ends[0][2] and "ddress already in use" in ends[0][2]
    assert "found no others" in ends[1][2]
    assert seconds < 30


def test_a_number_given_twice_ends_all(tmp_path):
    ends, seconds = joining(tmp_path, 3, [0, 1, 1])
    assert [code for code, _, _ in ends] == [7, 7, 7], ends
    assert all("a number of its own" in err and "Traceback" not in err for _, _, err in ends)
    assert seconds < 40


def test_unlike_flags_are_refused_in_each(tmp_path):
    own = {
        0: {"XLA_FLAGS": ""},
        1: {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true --xla_dump_hlo_as_text"},
    }
    ends, _ = joining(tmp_path, 2, [0, 1], deadline=30, own=own)
    for process, (code, out, err) in enumerate(ends):
        assert code == 5 and not out, err
        said = "MismatchError: XLA_FLAGS is nothing in process 0, --xla_cpu_enable_fast_math=true in process 1."
        assert said in err and f"where  process {process} of 2" in err


# ---------------------------------------------------------------- the command line


SCRIPT = """
import os, sys
number = int(os.environ["JAX_PROCESS_ID"])
sys.argv += ["run", *{options}[number], "--deadline", "60"]
from meshwright.cli import main
main()
"""


def commands(folder, *options: list[str]):
    (folder / "command.py").write_text(SCRIPT.format(options=[*options]))
    return finish(start(["command.py"], len(options), folder), folder)


def test_unlike_options_are_refused_with_their_values(folder):
    ends = commands(
        folder, ["p.json", "--seed", "1"], ["p.json", "--seed", "2", "--steps", "3", "--verify"]
    )
    for code, out, err in ends:
        assert code == 5 and not out, err
        assert "MismatchError: --steps is 10 in process 0, 3 in process 1." in err
        assert (
            "--seed is 1 in process 0, 2 in process 1" in err
            and "--verify is false in process 0, true" in err
        )


@pytest.mark.slow
def test_unlike_data_and_plans_are_refused_with_their_values(folder):
    (folder / "a.txt").write_text("so much depends upon " * 50)
    (folder / "b.txt").write_text("so much depends upon " * 60)
    for code, _, err in commands(
        folder, ["p.json", "--data", "a.txt"], ["p.json", "--data", "b.txt"]
    ):
        assert (
            code == 5 and "--data is 1050 bytes (digest" in err and "1260 bytes (digest" in err
        ), err
    found = load_plan(folder / "p.json")
    save_plan(found.model_copy(update={"recompute": "full"}), folder / "q.json")
    for code, _, err in commands(folder, ["p.json"], ["q.json"]):
        assert (
            code == 5 and "the plan's recompute is none in process 0, full in process 1." in err
        ), err


# ---------------------------------------------------------------- Python

WORK = """
import os
import jax, numpy as np
import meshwright as mw

mw.emulate(1)
mw.connect()
me, case = jax.process_index(), os.environ["CASE"]
scale = 0.1 + me if case == "steps" else 0.1

def step(state, x):
    loss, grad = jax.value_and_grad(lambda w: ((x @ w) ** 2).mean())(state["w"])
    return {"w": state["w"] - scale * grad}, loss

state = {"w": np.full((8, 8), 0.5, np.float32)}
batch = np.full((4, 8), 1.0 + (me if case == "batches" else 0), np.float32)
train = mw.parallelize(step, cluster="2xcpu", time_limit=20, verify=case == "verify" and me == 1)
for _ in range(2):
    state, loss = train(state, batch)
print("loss", float(loss))
"""
SAID = {
    "steps": "the step's graph is ",
    "batches": "x is float32[4, 8] from 1.0 (digest ",
    "verify": "verify is False in process 0, True in process 1.",
    "none": "",
}


@pytest.mark.parametrize(
    "case",
    [
        "batches",
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("steps", "verify", "none")),
    ],
)
def test_in_python_unlike_processes_are_refused(tmp_path, case):
    (tmp_path / "work.py").write_text(WORK)
    own = {"CASE": case, "MESHWRIGHT_DEADLINE": "60"}
    for code, out, err in finish(start(["work.py"], 2, tmp_path, {0: own, 1: own}), tmp_path):
        assert code == (0 if case == "none" else 5), err
        assert SAID[case] in err and ("loss" in out) == (case == "none")


# ---------------------------------------------------------------- what is said


def test_values_are_told_with_their_processes():
    assert _by_process(["0", "1", "0"]) == "0 in processes 0 and 2, 1 in process 1"
    assert _by_process(["", "b"]) == "nothing in process 0, b in process 1"
    assert _by_process([*["a"] * 9, "b"]) == "a in process 0 and 8 others, b in process 9"


def test_facts_are_equal_for_equal_bytes_only():
    import jax
    import numpy as np

    one = np.arange(6, dtype=np.float32).reshape(2, 3)
    other = one.copy()
    other[1, 2] = np.nextafter(other[1, 2], 9)
    assert described(one) == described(jax.numpy.asarray(one)) != described(other)
    assert described(one).startswith("float32[2, 3] from 0.0 (digest ")
    assert described(one) != described(one.reshape(3, 2)) and described(one) != described(
        one.view(np.int32)
    )
    assert described(jax.random.key(0)) != described(jax.random.key(1))
    assert described(np.float32(2)) == "2.0 (float32[], 00000040)" and described(np.zeros((0, 2)))
    assert arguments([one, 3], ["x", "n"].__getitem__)["n"].startswith("3 (int")


def test_software_and_decisions_are_readable(small_plan):
    assert software()["the version of jax"] and software()["jax_enable_x64"] == "False"
    assert decisions(small_plan)["the plan's recompute"] == "none"
    assert all(len(value) < 100 for value in decisions(small_plan).values())
