"""The command line in surroundings that do not help: pipes that close, full disks, ASCII, noisy files of users."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import pytest

from meshwright.cli import main
from meshwright.cli.run import running
from meshwright.ir.codec import load_plan, save_plan
from meshwright.ir.errors import LoweringError

from .processes import ROOT

SHELL = ("bash", "-c")
NOISE = """
import os, sys
import jax, jax.numpy as jnp

print("noise of an import")
os.write(1, b"noise below Python\\n")

def step(w, x):
    print("noise of tracing")
    loss, grad = jax.value_and_grad(lambda w: ((x @ w) ** 2).mean())(w)
    return w - 0.1 * grad, {"loss": loss}

def make():
    print("noise of a call", flush=True)
    os.system("echo noise of a process")
    return step, jnp.ones((8, 8)), jnp.ones((16, 8))
"""


def meshwright(
    *words: str, cwd=None, stdout=subprocess.PIPE, env=None
) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **(env or {})}
    return subprocess.run(
        [sys.executable, "-m", "meshwright", *words], stdout=stdout, stderr=subprocess.PIPE, cwd=cwd, env=env,
        timeout=120,
    )  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["meshwright", *words])
        with pytest.raises(SystemExit) as done:
            main()
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return call


@pytest.mark.parametrize("words", [("--help",), ("clusters", "8xcpu", "--format", "json")])
def test_a_full_disk_is_told_as_such(words):
    with open("/dev/full", "wb") as full:
        done = meshwright(*words, stdout=full)
    assert done.returncode == 2 and b"No space left on device" in done.stderr, done.stderr
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


@pytest.mark.parametrize("words", [("--help",), ("models",)])
def test_a_closed_pipe_ends_quietly(words):
    reader, writer = os.pipe()
    os.close(reader)
    done = meshwright(*words, stdout=writer)
    os.close(writer)
    assert done.returncode == 141 and not done.stderr, done.stderr


def test_ascii_is_enough(small_plan, tmp_path):
    save_plan(small_plan, tmp_path / "p.json")
    ascii_only = {"PYTHONIOENCODING": "ascii", "LANG": "C"}
    for words in (
        ("show", "p.json"),
        ("show", "p.json", "--format", "json"),
        ("clusters", "8xcpu"),
    ):
        done = meshwright(*words, cwd=tmp_path, env=ascii_only)
        assert done.returncode == 0 and done.stdout.isascii(), done.stderr
        if "json" in words:
            assert json.loads(done.stdout)["name"] == small_plan.name


def test_stdout_and_stderr_may_be_closed():
    code = "import os, sys; os.close(1); os.close(2); sys.argv = ['meshwright', {!r}]"
    code += "\nfrom meshwright.cli import main\nmain()"
    for word in ("models", "show"):
        env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run([sys.executable, "-c", code.format(word)], env=env, timeout=60)
        assert done.returncode == 2, word
    for word, wanted in (("models", 0), ("show", 2)):
        done = subprocess.run(
            [*SHELL, f"{sys.executable} -m meshwright {word} >&- 2>&-"], env=env, timeout=60
        )
        assert done.returncode == wanted, word


def test_noise_of_a_users_file_never_reaches_stdout(tmp_path):
    """In a process of its own: noise below Python goes past what pytest puts in the place of stdout."""
    (tmp_path / "train.py").write_text(NOISE)
    plan = ("plan", "--model", "train.py:make", "--cluster", "2xcpu", "--mesh", "2", "-o", "p.json")
    done = meshwright(*plan, "--format", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "make" and b"noise below Python" in done.stderr
    done = meshwright("run", "p.json", "--steps", "2", "--format", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["losses"]) == 2
    assert b"noise of tracing" in done.stderr and b"noise of a process" in done.stderr


OWN = """
import jax, jax.numpy as jnp

def step(w, x):
    loss, grad = jax.value_and_grad(lambda w: ((x @ w) ** 2).mean())(w)
    return w - 0.1 * grad, {"loss": loss}

def make():
    return step, jnp.ones((8, 8)), jnp.ones((16, 8))
"""


def test_what_fails_in_a_running_step_is_no_defect_of_ours(small_plan):
    refused = pytest.raises(LoweringError, match="the step cannot run here, or failed as it ran")
    with refused as caught, running(small_plan):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes")
    assert caught.value.exit_code == 5 and "Out of memory allocating 7 bytes" in str(caught.value)


def test_an_audit_above_the_limit_ends_with_3(run, tmp_path):
    (tmp_path / "own_audit.py").write_text(OWN)
    code, _, err = run(
        "plan", "--model", "own_audit.py:make", "--cluster", "2xcpu", "--mesh", "2", "-o", "p.json"
    )
    assert code == 0, err
    assert run("audit", "p.json")[0] == 0
    found = load_plan(tmp_path / "p.json")
    estimate = found.estimate.model_copy(update={"limit_bytes": 100.0})
    save_plan(found.model_copy(update={"estimate": estimate}), tmp_path / "p.json")
    code, out, _ = run("audit", "p.json")
    assert code == 3 and "predicted" in out


@pytest.mark.parametrize("place", ["folder", "ring", "folder/below/p.json", "x" * 300])
def test_outputs_that_cannot_be_are_refused_before_the_work(run, tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "ring").symlink_to("ring")
    code, out, err = run(
        "plan", "--model", "gpt3-175b", "--cluster", "128xh100x8@ib400", "-o", place
    )
    assert code == 2 and not out and "cannot be written" in err
