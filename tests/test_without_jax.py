"""What works where jax is not installed: everything that reads no step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from meshwright.api import plan
from meshwright.backends.xla.capture import capture
from meshwright.graph_file import save_graph
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.codec import load_graph, load_plan, save_plan
from meshwright.models import build
from meshwright.planner.request import Request
from meshwright.planning import plan_graph

WITHOUT = """
import importlib, pkgutil, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jax", "jaxlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""

ROOMS = """
for room in ("ir", "planner", "view", "backends.runtime"):
    package = importlib.import_module(f"meshwright.{room}")
    for each in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(each.name)
        print(each.name)
"""

COMMAND = """
sys.argv = ["meshwright", *sys.argv[1:]]
from meshwright.cli import main
main()
"""

NAMES = """
import meshwright as mw
print(mw.load_plan(sys.argv[1]))
try:
    mw.plan
except mw.MeshwrightError as error:
    print(error)
"""


def run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code, *args], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Path:
    """Of a step of linear regression."""
    w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 32), (256, 64)))

    def step(w, x):
        value, slope = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(w)
        return w - 0.1 * slope, value

    path = tmp_path_factory.mktemp("graphs") / "linear.graph.json"
    save_graph(capture(step, w, x, donate_argnums=0).graph, path)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    example = build("gpt-tiny")
    found = plan(example.step, example.state, example.batch, cluster="8xcpu")
    save_plan(found.model_copy(update={"recipe": {"model": "gpt-tiny"}}), path)
    return path


def test_the_graph_the_planner_the_views_and_the_runtime_take_no_jax():
    found = run(ROOMS)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.split()) > 150


def test_a_saved_plan_is_shown(saved):
    found = run(COMMAND, "show", str(saved))
    assert found.returncode == 0, found.stderr
    assert "train_step on 8xcpu" in found.stdout


def test_a_saved_graph_is_planned_simulated_and_shown(graph, tmp_path):
    place = tmp_path / "plan.json"
    found = run(COMMAND, "plan", "--model", str(graph), "--cluster", "4xcpu", "-o", str(place))
    assert found.returncode == 0, found.stderr
    assert "linear on 4xcpu" in found.stdout
    here = plan_graph(load_graph(graph.read_text()), Cluster.parse("4xcpu"), Request(), "linear")
    assert load_plan(place).strategies == here.strategies and load_plan(place).graph == here.graph
    simulated = run(COMMAND, "simulate", str(place), "--set", "devices.cpu.memory=1GiB")
    assert simulated.returncode == 0, simulated.stderr
    assert "unoverlapped" in simulated.stdout
    shown = run(COMMAND, "show", str(place), "--program")
    assert shown.returncode == 0, shown.stderr
    assert "dot_general" in shown.stdout and "all_reduce" in shown.stdout


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--seq", "8"), "--seq is for models"),
        (("--save-graph", "other.graph.json"), "a saved graph already"),
    ],
)
def test_options_that_a_graph_cannot_have_are_refused(graph, options, complaint):
    found = run(COMMAND, "plan", "--model", str(graph), "--cluster", "4xcpu", *options)
    assert found.returncode == 2 and complaint in found.stderr


def test_a_graph_that_was_changed_is_refused(graph, tmp_path):
    changed = tmp_path / "changed.graph.json"
    changed.write_text(
        graph.read_text().replace('"lhs_contracting": [0]', '"lhs_contracting": [1]')
    )
    found = run(COMMAND, "plan", "--model", str(changed), "--cluster", "4xcpu")
    assert found.returncode == 2 and "changed.graph.json" in found.stderr
    assert "not the one its fingerprint names" in found.stderr


def test_a_cost_graph_is_solved(tmp_path):
    nodes = {"intervals": [[0, 2]], "costs": [[3, 1]], "usages": [[1, 1]]}
    problem = {"name": "one", "nodes": nodes, "edges": {"nodes": [], "costs": []}, "usage_limit": 4}
    (tmp_path / "one.json").write_text(json.dumps({"problem": problem}))
    found = run(COMMAND, "solve", str(tmp_path / "one.json"))
    assert found.returncode == 0, found.stderr
    assert "cost        1" in found.stdout


@pytest.mark.parametrize("command", [("clusters",), ("schedule", "--help"), ("--version",)])
def test_other_commands_run(command):
    assert run(COMMAND, *command).returncode == 0


def test_a_bare_command_says_what_there_is():
    found = run(COMMAND)
    assert found.returncode == 2 and not found.stdout
    assert found.stderr.startswith("Usage:") and "\n  plan " in found.stderr


@pytest.mark.parametrize(
    "command", [("models",), ("plan", "--model", "gpt-tiny", "--cluster", "h100x8")]
)
def test_a_command_that_needs_jax_says_how_to_get_it(command):
    found = run(COMMAND, *command)
    assert found.returncode == 6
    assert "MissingDependencyError: jax is not installed" in found.stderr
    assert "pip install 'meshwright[jax]'" in found.stderr


def test_a_plan_of_a_step_needs_jax_to_be_simulated(saved):
    found = run(COMMAND, "simulate", str(saved))
    assert found.returncode == 6 and not found.stdout
    assert "pip install 'meshwright[jax]'" in found.stderr


def test_a_name_that_needs_jax_says_so_too(saved):
    found = run(NAMES, str(saved))
    assert found.returncode == 0, found.stderr
    assert "train_step on 8xcpu" in found.stdout and "meshwright[jax]" in found.stdout
