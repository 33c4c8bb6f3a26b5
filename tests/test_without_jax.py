"""What works where jax is not installed: everything that reads no step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.api import plan
from meshwright.ir.codec import save_plan
from meshwright.models import build

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
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    example = build("gpt-tiny")
    save_plan(plan(example.step, example.state, example.batch, cluster="8xcpu"), path)
    return path


def test_the_graph_the_planner_the_views_and_the_runtime_take_no_jax():
    found = run(ROOMS)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.split()) > 150


def test_a_saved_plan_is_shown(saved):
    found = run(COMMAND, "show", str(saved))
    assert found.returncode == 0, found.stderr
    assert "train_step on 8xcpu" in found.stdout


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


def test_a_name_that_needs_jax_says_so_too(saved):
    found = run(NAMES, str(saved))
    assert found.returncode == 0, found.stderr
    assert "train_step on 8xcpu" in found.stdout and "meshwright[jax]" in found.stdout
