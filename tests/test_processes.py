"""A run over several processes equals the unsharded step, and ends with a reason when one of them does."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

from meshwright.api import plan as make_plan
from meshwright.backends.runtime.rendezvous import deadline_seconds
from meshwright.ir.codec import load_plan, save_plan
from meshwright.ir.errors import LoweringError, UsageError
from meshwright.planner.request import Request
from meshwright.processes import per_process
from meshwright.recipe import make

from .processes import MODEL, ROOT, finish, start


def model():
    made = make({"model": MODEL})
    return made.step, *made.args


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


def planned(folder, ranks: int, schedule: str, devices: int = 8) -> str:
    """A plan of the benchmark's model, as the command line saves it."""
    path = folder / f"{schedule}-{ranks}.json"
    if not path.exists():
        pins = {
            "pp": ranks,
            "schedule": schedule,
            "microbatches": 4,
            "recompute": "none",
            "time_limit": 20,
        }
        found = make_plan(
            *model(), cluster=f"{devices}xcpu", request=Request(**pins), donate_argnums=0
        )
        save_plan(found.model_copy(update={"recipe": {"model": MODEL}}), path)
    return path.name


def losses(steps: int) -> list[float]:
    """What one device finds."""
    step, state, batch = model()
    found = []
    for _ in range(steps):
        state, metrics = jax.jit(step)(state, batch)
        found.append(float(metrics["loss"]))
    return found


def train(folder, plan: str, processes: int, *more: str):
    arguments = [
        "-m",
        "meshwright",
        "run",
        plan,
        "--steps",
        "3",
        "--verify",
        "--format",
        "json",
        *more,
    ]
    return finish(start(arguments, processes, folder), folder)


def check_trains(folder, plan: str, processes: int) -> None:
    ends = train(folder, plan, processes)
    assert [code for code, _, _ in ends] == [0] * processes, ends
    shown = json.loads(ends[0][1])
    assert shown["losses"] == pytest.approx(losses(3), rel=1e-5)
    pipeline = load_plan(folder / plan).pipeline
    assert {each["step"] for each in shown["passes"]} == {
        word for row in pipeline.orders for word in row.split()
    }
    assert not any(out for _, out, _ in ends[1:])


# ---------------------------------------------------------------- training


def test_two_processes_of_four_devices_train_as_one_device(folder):
    check_trains(folder, planned(folder, 4, "1f1b"), 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, schedule, processes",
    [
        (4, "1f1b", 4),
        (2, "1f1b", 4),
        (4, "gpipe", 2),
        (4, "zb-h1", 4),
        (2, "interleaved", 2),
        (8, "1f1b", 2),
    ],
)
def test_any_schedule_over_any_processes(folder, ranks, schedule, processes):
    """Stages within a process, one each, and over two processes."""
    check_trains(folder, planned(folder, ranks, schedule), processes)


@pytest.mark.slow
def test_a_plan_without_a_pipeline_runs_over_processes_too(folder):
    found = make_plan(*model(), cluster="8xcpu", request=Request(time_limit=20), donate_argnums=0)
    save_plan(found.model_copy(update={"recipe": {"model": MODEL}}), folder / "flat.json")
    ends = train(folder, "flat.json", 2)
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert json.loads(ends[0][1])["losses"] == pytest.approx(losses(3), rel=1e-5)


WORK = """
import meshwright as mw
from pipeline_processes import model

mw.emulate(4)
mw.connect()
step, state, batch = model()
train = mw.parallelize(step, cluster="8xcpu", verify=True, pp=4, microbatches=4, time_limit=20)
for _ in range(3):
    state, metrics = train(state, batch)
    print("loss", float(metrics["loss"]))
"""


def test_in_python_the_first_process_plans_and_all_run(folder):
    (folder / "work.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n{WORK}"
    )
    ends = finish(start(["work.py"], 2, folder), folder)
    assert [code for code, _, _ in ends] == [0, 0], ends
    for _, out, _ in ends:
        found = [
            float(number) for number in re.findall(r"loss (\S+)", out)
        ]  # gloo prints there too
        assert found == pytest.approx(losses(3), rel=1e-5)


STACKED = """
import jax, jax.numpy as jnp, numpy as np
import meshwright as mw
from jax.experimental.multihost_utils import process_allgather

mw.emulate(2)
mw.connect()

def step(params, x):
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    loss = lambda p: jnp.mean((jax.lax.scan(layer, x @ p["first"], p["w"])[0] @ p["last"]) ** 2)
    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(jnp.subtract, params, grads), value

ones = lambda *shape: np.ones(shape, np.float32) / 8
state = wanted = {"first": ones(8, 8), "w": ones(4, 8, 8), "last": ones(8, 8)}
train = mw.parallelize(step, cluster="4xcpu", verify=True, pp=2, microbatches=2, program="single")
for _ in range(2):
    state, wanted = train(state, ones(4, 8))[0], jax.jit(step)(wanted, ones(4, 8))[0]
w = state["w"]
try:
    np.asarray(w)
except Exception as error:
    print(type(error).__name__, error)
whole = process_allgather(jnp.asarray(w), tiled=True)
np.testing.assert_allclose(whole, wanted["w"], rtol=1e-5)
print(w.shape, [len(layer.addressable_shards) for layer in w])
"""


def test_a_stack_of_layers_lies_on_the_processes_of_its_stages(folder):
    (folder / "stacked.py").write_text(STACKED)
    ends = finish(start(["stacked.py"], 2, folder), folder)
    for process, (code, out, err) in enumerate(ends):
        assert code == 0, err
        assert (
            "LoweringError an array of shape (4, 8, 8) has layers on devices of other processes"
            in out
        )
        assert "process_allgather(jnp.asarray(leaf), tiled=True)" in out
        assert out.endswith(f"(4, 8, 8) {[[2, 2, 0, 0], [0, 0, 2, 2]][process]}\n")


UNLIKE = """
import jax, numpy as np
import meshwright as mw
from jax.sharding import Mesh
from meshwright.backends.xla.devices import is_mine, place
from meshwright.backends.runtime.programs import Route
from meshwright.backends.xla.devices import named_sharding
from meshwright.backends.xla.handover import Handover
from meshwright.ir.sharding import Sharding, replicated

mw.emulate(4)
mw.connect()
devices = jax.devices()
wide = Mesh(np.array(devices[:4]).reshape(2, 2), ("x", "y"))
narrow = Mesh(np.array(devices[4:6]), ("z",))
rows = np.arange(24, dtype=np.float32).reshape(4, 6)

def check(sender, receiver, leaves, arrives):
    routes = [Route((4, 6), "f32", Sharding(leaves), Sharding(arrives)), Route((), "s32", replicated(0), replicated(0))]
    goals = [named_sharding(sender, route.leaves) for route in routes]
    arrays = [place(a, goal) for a, goal in zip((rows, np.int32(7)), goals)] if is_mine(sender) else None
    found, token = Handover(routes, sender, receiver)(arrays)
    jax.block_until_ready(token)
    assert (found is not None) == is_mine(receiver)
    for have, want, route in zip(found or (), (rows, np.int32(7)), routes):
        assert have.sharding == named_sharding(receiver, route.arrives)
        for shard in have.addressable_shards:
            np.testing.assert_array_equal(shard.data, want[shard.index])

check(wide, narrow, (("x",), ("y",)), (("z",), ()))
check(narrow, wide, ((), ("z",)), (("x", "y"), ()))
check(narrow, wide, (("z",), ()), ((), ()))
check(wide, Mesh(np.array(devices[4:]).reshape(2, 2), ("x", "y")), (("x",), ()), (("y",), ("x",)))
print("right")
"""


def test_stages_with_unlike_meshes_hand_over_between_processes(folder):
    (folder / "unlike.py").write_text(UNLIKE)
    ends = finish(start(["unlike.py"], 2, folder), folder)
    assert [(code, out.split()[-1]) for code, out, _ in ends] == [(0, "right")] * 2, ends


# ---------------------------------------------------------------- processes that end or stall


def interrupted(folder, victim: int, how: signal.Signals):
    """Two processes, one of which gets a signal once both train; how they end, and how soon."""
    plan = planned(folder, 4, "1f1b")
    started = start(
        ["-m", "meshwright", "run", plan, "--steps", "100000", "--deadline", "15"], 2, folder
    )
    begin = time.monotonic()
    while (folder / "err.0").read_text().count(
        "connected to"
    ) < 6 and time.monotonic() < begin + 60:
        time.sleep(0.2)
    time.sleep(5)
    started[victim].send_signal(how)
    begin = time.monotonic()
    started[1 - victim].wait(timeout=60)
    seconds = time.monotonic() - begin
    started[victim].kill()
    return finish(started, folder)[1 - victim], seconds


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_other_with_a_reason(folder, victim):
    (code, _, err), seconds = interrupted(folder, victim, signal.SIGKILL)
    assert code == 7, err
    assert "ProcessError: " in err and f"where  process {1 - victim} of 2" in err
    assert seconds < 25  # at the deadline at the latest: gloo does not notice while it connects


@pytest.mark.slow
def test_a_wait_ends_at_the_deadline_and_says_who_waited_for_whom(folder):
    (code, _, err), seconds = interrupted(folder, 1, signal.SIGSTOP)
    assert code == 7, err
    assert "waited 15 s for process 1." in err and "MESHWRIGHT_DEADLINE=SECONDS" in err
    assert 10 < seconds < 30


@pytest.mark.slow
def test_twenty_runs_do_not_hang():
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "pipeline_processes.py"),
        "--runs",
        "20",
        "--steps",
        "20",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout


def test_devices_that_cannot_be_dealt_out_are_refused(folder):
    plan = load_plan(folder / planned(folder, 4, "1f1b"))
    assert per_process(plan, 4) == 2
    with pytest.raises(LoweringError, match="8 devices cannot be dealt out to 3 processes"):
        per_process(plan, 3)


def test_a_deadline_is_a_time(monkeypatch):
    monkeypatch.setenv("MESHWRIGHT_DEADLINE", "12.5")
    assert deadline_seconds() == 12.5
    monkeypatch.setenv("MESHWRIGHT_DEADLINE", "soon")
    with pytest.raises(UsageError, match="`soon` is no time"):
        deadline_seconds()
