"""Checkpoints of torch ranks: training goes on from them under any plan, and in plain torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.distributed.checkpoint as dcp  # noqa: E402

import meshwright as mw  # noqa: E402
from meshwright.ir.errors import LoweringError, MismatchError, UsageError  # noqa: E402

from .test_cli import run  # noqa: E402, F401
from .torch_models import OPTIMIZERS, Perceptron, class_loss, feature_batch  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "phases"),
    [
        ("gpt", ['4:{"mesh":(2,2)}', '2:{"pp":2,"microbatches":2}']),
        pytest.param(
            "gpt", ['2:{"pp":2}', '8:{"mesh":(2,2,2)}', "1:", '4:{"pp":2,"microbatches":4}'],
            marks=pytest.mark.slow,
        ),
        pytest.param("convnet", ["4:", "2:", "8:"], marks=pytest.mark.slow),
        pytest.param("mixture", ['4:{"mesh":(2,2)}', '2:{"mesh":(2,)}'], marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_other_ranks_go_on_as_one_process_that_was_never_interrupted(
    name: str, phases: list[str], tmp_path: Path
):
    command = [sys.executable, "-m", "tests.torch_resume", name, str(tmp_path), *phases]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == len(phases)


def stepped(steps: int = 1, width: int = 16, optimizer: str = "adamw") -> tuple[Any, Any, Any]:
    """A step on one device after some steps, its model and its optimizer."""
    torch.manual_seed(0)
    model = Perceptron()
    if width != 16:
        model[0], model[2] = torch.nn.Linear(8, width), torch.nn.Linear(width, 10)
    made = OPTIMIZERS[optimizer](model.parameters())
    step = mw.torch.parallelize(model, class_loss, made, feature_batch())
    for _ in range(steps):
        step(feature_batch())
    return step, model, made


def alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_loaded_is_what_was_saved(tmp_path: Path):
    step, *_ = stepped(2)
    step.save(tmp_path / "deep" / "1")
    other, *_ = stepped(0)
    assert not alike(other.state(), step.state())
    other.load(tmp_path / "deep" / "1")
    assert alike(other.state(), step.state())
    assert float(other.state()["optimizer.step"]) == 2
    assert [each.name for each in (tmp_path / "deep").iterdir()] == ["1"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_plain_torch_is_loaded(tmp_path: Path):
    step, model, made = stepped(2)
    step.write_back()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = {names[id(parameter)]: held for parameter, held in made.state.items()}
    groups = [{**made.param_groups[0], "params": [*state]}]
    whole = {"model": model.state_dict(), "optimizer": {"state": state, "param_groups": groups}}
    dcp.save(whole, checkpoint_id=tmp_path)
    other, *_ = stepped(0)
    other.load(tmp_path)
    assert alike(other.state(), step.state())


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (
            {"width": 12},
            r"has f32\[16, 8\] for `model.0.weight`, which is f32\[12, 8\] in the step",
        ),
        ({"optimizer": "adam"}, "misses `optimizer.state.0.weight.max_exp_avg_sq`"),
        ({"optimizer": "sgd"}, "misses `optimizer.state.0.weight.momentum_buffer`"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(
    other: dict[str, Any], told: str, tmp_path: Path
):
    stepped(1)[0].save(tmp_path / "1")
    step, *_ = stepped(0, **other)
    before = step.state()
    with pytest.raises(MismatchError, match=told):
        step.load(tmp_path / "1")
    assert alike(step.state(), before)


def test_what_has_no_place_in_the_step_is_refused(tmp_path: Path):
    stepped(1, optimizer="adam")[0].save(tmp_path / "1")
    with pytest.raises(MismatchError, match="exp_avg_sq`, which has no place in the step"):
        stepped(0)[0].load(tmp_path / "1")


def test_damage_is_refused_and_changes_nothing(tmp_path: Path):
    step, *_ = stepped(1)
    with pytest.raises(UsageError, match="there is no checkpoint"):
        step.load(tmp_path / "none")
    step.save(tmp_path / "1")
    [parts] = (tmp_path / "1").glob("*.distcp")
    before = step.state()
    shutil.copytree(tmp_path / "1", tmp_path / "short")
    (tmp_path / "short" / parts.name).write_bytes(parts.read_bytes()[:2000])
    with pytest.raises(LoweringError, match="rank 0 failed"):
        step.load(tmp_path / "short")
    parts.unlink()
    with pytest.raises(LoweringError, match="distcp` is missing of 1 files"):
        step.load(tmp_path / "1")
    (tmp_path / "1" / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(LoweringError, match="it cannot be read: UnpicklingError"):
        step.load(tmp_path / "1")
    assert alike(step.state(), before)


def test_nothing_is_written_over_or_left_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    step, *_ = stepped(0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("kept")
    with pytest.raises(UsageError, match="there is something already"):
        step.save(tmp_path / "mine")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(LoweringError, match="cannot be written"):
        step.save(tmp_path / "file" / "1")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", full)
    with pytest.raises(LoweringError, match="No space left on device"):
        step.save(tmp_path / "1")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "mine"]
    monkeypatch.undo()
    (tmp_path / ".1.partial").mkdir()  # of a run that was killed
    step.save(tmp_path / "1")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["1", "file", "mine"]


# ---------------------------------------------------------------- meshwright run


def test_run_goes_on_on_other_devices_and_another_backend(run: Any, tmp_path: Path):  # noqa: F811
    import jax

    assert len(jax.devices()) == 8  # commands for fewer take the first of these

    def made(*words: str) -> list[str]:
        code, out, err = run(*words)
        assert code == 0, err
        return out.splitlines()

    def trained(plan: str, steps: int, *words: str) -> list[str]:
        rows = made("run", str(tmp_path / plan), "--steps", str(steps), *words)
        return [row.rpartition("  ")[0] for row in rows if row.startswith("step")]

    for plan, words in (
        ("one", "--cluster 1xcpu"),
        ("two", "--cluster 2xcpu"),
        ("stages", "--cluster 2xcpu --pp 2 --program stages"),
    ):
        options = ["--dtype", "f32", "-o", str(tmp_path / plan), *words.split()]
        made("plan", "--model", "gpt-tiny", *options)
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    found = trained("two", 2, "--save", first)
    found += trained("stages", 2, "--backend", "torch", "--resume", first, "--save", second)
    found += trained("one", 1, "--resume", second)
    for row, wanted in zip(found, trained("one", 5), strict=True):
        (*step, loss), (*number, alone) = row.split(), wanted.split()
        assert step == number and float(loss) == pytest.approx(float(alone), abs=2e-4)


def test_run_refuses_before_it_plans(run: Any, tmp_path: Path):  # noqa: F811
    (tmp_path / "notes").write_text("kept")
    code, _, err = run("run", "--model", "gpt-tiny", "--save", str(tmp_path))
    assert code == 2 and "something already" in err and "devices" not in err
