"""The command line as a user types it: what it prints, writes and exits with."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from meshwright import demo
from meshwright.cli import main
from meshwright.ir.codec import load_plan, save_plan
from meshwright.ir.local.checks import verify_local
from meshwright.ir.local.pipeline_checks import verify_pipeline
from meshwright.ir.local.pipeline_text import parse_pipeline
from meshwright.ir.local.text import parse_local
from meshwright.ir.passes.coalesce import Coalesce

QUICK = ("--mesh", "8", "--microbatches", "1", "--time-limit", "20")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run("plan", "--model", ...) -> (exit code, stdout, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["meshwright", *words])
        with pytest.raises(SystemExit) as done:
            main()
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return call


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> str:
    """The file that `plan` writes."""
    place = tmp_path_factory.mktemp("planned") / "p.json"
    step = ("--model", "gpt-tiny", "--layers", "1")
    words = ("plan", *step, "--cluster", "8xcpu", *QUICK, "-o", str(place))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["meshwright", *words])
        with pytest.raises(SystemExit) as done:
            main()
    assert not done.value.code
    return place.read_text()


@pytest.fixture
def plan_file(run, planned, tmp_path):
    (tmp_path / "p.json").write_text(planned)
    return "p.json"


def test_plan_prints_a_screen_and_saves_a_file(run, tmp_path):
    code, out, err = run("plan", "--model", "gpt-tiny", "--cluster", "8xcpu", *QUICK)
    assert code == 0
    assert out.startswith("gpt-tiny on 8xcpu: 8 devices as x=8")
    for part in ("predicted", "gap", "memory per device", "not searched"):
        assert part in out
    assert len(out.splitlines()) <= 55
    assert "saved to gpt-tiny.plan.json" in err
    assert load_plan(tmp_path / "gpt-tiny.plan.json").recipe == {"model": "gpt-tiny"}


def test_plan_honours_every_pin(run, tmp_path):
    code, out, err = run(
        "plan", "--model", "gpt-tiny", "--cluster", "8xcpu", "--global-batch", "32", "--seq", "16",
        "--layers", "2", "--optimizer", "sgd", "--dtype", "f32", "--mesh", "4x2", "--microbatches", "2",
        "--recompute", "full", "--memory", "1GiB", "--seed", "7", "-o", "p.json", "--format", "json",
    )  # fmt: skip
    assert code == 0, err
    shown, plan = json.loads(out), load_plan(tmp_path / "p.json")
    assert plan.mesh.shape == (4, 2) and plan.microbatches == 2 and plan.recompute == "full"
    assert plan.estimate.limit_bytes == 2**30 and plan.proof.seed == 7
    assert plan.recipe == {
        "model": "gpt-tiny", "batch": 32, "seq": 16, "layers": 2, "optimizer": "sgd", "dtype": "f32",
    }  # fmt: skip
    assert shown["estimate"]["step_seconds"] == plan.estimate.step_seconds
    assert shown["proof"]["gap"] == plan.proof.gap
    tokens = next(t for t in plan.tensors if "tokens" in t.name)
    assert tokens.shape == (32, 16)


def test_equal_seeds_give_equal_plans(run, tmp_path):
    for name in ("a.json", "b.json"):
        run("plan", "--model", "gpt-tiny", "--cluster", "8xcpu", *QUICK, "-o", name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes(), (
        "no clock in it"
    )


def test_show_prints_what_plan_printed_and_writes_html(run, plan_file, tmp_path):
    code, out, _ = run("show", plan_file, "--html", "p.html")
    assert code == 0 and out.startswith("gpt-tiny on 8xcpu")
    assert (tmp_path / "p.html").read_text().startswith("<!doctype html>")
    assert run("show", plan_file, "--all")[1].count("\n") > out.count("\n")
    assert json.loads(run("show", plan_file, "--format", "json")[1])["words"]


def test_show_prints_what_each_device_runs(run, plan_file):
    code, out, _ = run("show", plan_file, "--program")
    assert code == 0
    program = parse_local(out)
    verify_local(program)
    assert program.mesh == load_plan(plan_file).mesh and len(program.ops) > 20
    assert run("show", plan_file, "--program", "--all")[0] == 2


TWO_STAGES = (
    "--layers", "2", "--cluster", "8xcpu", "--pp", "2", "--mesh", "4", "--microbatches", "2",
    "--recompute", "none", "-o", "p.json",
)  # fmt: skip


@pytest.mark.parametrize("model, unstacked", [("gpt-tiny", False), ("gpt-tiny-scan", True)])
def test_show_prints_what_each_rank_of_a_pipeline_runs(run, model, unstacked):
    code, _, err = run("plan", "--model", model, *TWO_STAGES, "--schedule", "1f1b")
    assert code == 0, err
    code, out, err = run("show", "p.json", "--program")
    assert code == 0, err
    plan, program = load_plan("p.json"), parse_pipeline(out)
    verify_pipeline(program)
    assert plan.pipeline.unstacked == unstacked
    assert len(program.ranks) == 2 and "\nrank 1 {" in out and "\n  send forward v" in out


def test_a_pipeline_is_simulated_on_a_changed_cluster(run):
    """From what its ranks run; nothing changed, the step is within a tenth of what the plan says."""
    code, _, err = run("plan", "--model", "gpt-tiny-scan", *TWO_STAGES, "--schedule", "1f1b")
    assert code == 0, err
    seconds = []
    for change in (("--overlap", "none"), ("--set", "device.memory_bandwidth=0.1 GB/s")):
        code, out, err = run("simulate", "p.json", *change, "--format", "json")
        assert code == 0, err
        found = json.loads(out)
        assert len(found["ranks"]) == 2
        seconds.append(found["seconds"])
    assert seconds[0] == pytest.approx(found["planned"], rel=0.1)
    assert seconds[1] > 3 * seconds[0]
    code, out, _ = run("simulate", "p.json", "--set", "device.memory_bandwidth=0.1 GB/s")
    assert code == 0 and "rank 1" in out and "the plan says" in out


def test_show_says_that_a_single_program_is_not_printed(run):
    code, _, err = run("plan", "--model", "gpt-tiny", *TWO_STAGES, "--program", "single")
    assert code == 0, err
    code, out, err = run("show", "p.json", "--program")
    assert code == 2 and not out
    assert "a single program is not printed yet" in err and "--program stages" in err


def test_a_pass_is_printed_by_its_name(run, plan_file, monkeypatch):
    """Before and after, each a program that can be read back."""
    monkeypatch.setenv("MESHWRIGHT_DUMP", "coalesce")
    code, out, err = run("audit", plan_file)
    assert code == 0 and "all_reduce" in out and "pass coalesce" not in out
    before, _, rest = err.partition("before pass coalesce\n")[2].partition("after pass coalesce\n")
    after = rest[: rest.index("\n}\n") + 3]
    assert str(Coalesce().run(parse_local(before))) == after
    assert 0 < after.count("= all_reduce") < before.count("= all_reduce")


def test_a_pass_that_does_not_exist_is_told_whatever_the_command(run, monkeypatch):
    monkeypatch.setenv("MESHWRIGHT_DUMP", "coalesce,colaesce")
    code, out, err = run("models")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "UsageError: `colaesce` is no pass.",
        "  where  MESHWRIGHT_DUMP",
        "  try    one of coalesce, or all",
    ]


def test_run_trains_and_agrees_with_one_device(run, plan_file):
    code, out, err = run("run", plan_file, "--steps", "5", "--verify")
    assert code == 0, err
    losses = [float(line.split()[3]) for line in out.splitlines()]
    assert len(losses) == 5 and losses[-1] < losses[0]
    again = json.loads(run("run", plan_file, "--steps", "5", "--format", "json")[1])
    assert again["losses"] == pytest.approx(losses, abs=1e-3)


def test_audit_compares_with_the_compiled_program(run, plan_file):
    code, out, _ = run("audit", plan_file)
    assert code == 0 and "predicted" in out and "all_reduce" in out
    found = json.loads(run("audit", plan_file, "--format", "json")[1])
    assert abs(found["difference"]) < 0.25
    assert found["compiled_bytes"] == sum(line["compiled_bytes"] for line in found["lines"])


def test_lists(run):
    assert "gpt3-175b" in run("models")[1].split()
    assert "parameters" in run("models", "gpt2")[1]
    assert "h100" in run("clusters")[1]
    assert "32 devices" in run("clusters", "4xh100x8@ib400")[1]
    assert json.loads(run("clusters", "8xcpu", "--format", "json")[1])
    assert json.loads(run("models", "--format", "json")[1])


STEPS = """
import jax, jax.numpy as jnp
shape = jax.ShapeDtypeStruct((16, 16), jnp.float32)

def step(weight, x, y, scale):
    loss, gradient = jax.value_and_grad(lambda w: jnp.mean((x @ w - y) ** 2))(weight)
    return weight - 0.1 * gradient * scale[0, 0], {"loss": loss}

def four(): return step, shape, shape, shape, shape
def fails(): raise ValueError("no data here")
def asks(path): return step, shape, shape
def stateless(): return (lambda w, x: jnp.sum(w @ x)), shape, shape
def retyped(): return (lambda w, x: (w.astype(jnp.bfloat16), {"loss": x.sum()})), shape, shape
"""


def test_a_step_of_ones_own_with_any_number_of_arguments(run, tmp_path):
    (tmp_path / "own.py").write_text(STEPS)
    code, out, err = run(
        "plan", "--model", "own.py:four", "--cluster", "8xcpu", *QUICK, "-o", "p.json"
    )
    assert code == 0, err
    code, out, err = run("run", "p.json", "--steps", "2", "--verify")
    assert code == 0 and len(out.splitlines()) == 2, err
    code, _, err = run("run", "p.json", "--seed", "3")
    assert code == 2 and "as its file makes them" in err


NORMED = """
import jax, jax.numpy as jnp, numpy as np

def step(state, x):
    def loss_of(weight):
        y = x @ weight
        mean, variance = y.mean(0), y.var(0)
        return jnp.mean(jnp.tanh((y - mean) * jax.lax.rsqrt(variance + 1e-3) - x) ** 2), mean
    (loss, mean), gradient = jax.value_and_grad(loss_of, has_aux=True)(state["weight"])
    return {"weight": state["weight"] - 0.1 * gradient, "mean": 0.9 * state["mean"] + 0.1 * mean}, {"loss": loss}

def make():
    draw = np.random.default_rng(0)
    return step, {"weight": draw.normal(size=(8, 8)) / 3, "mean": np.zeros(8)}, draw.normal(size=(32, 8)) + 1
"""


def test_statistics_of_each_microbatch_are_run_and_verified(run, tmp_path):
    (tmp_path / "normed.py").write_text(NORMED)
    pins = ("--mesh", "8", "--microbatches", "4", "-o", "p.json")
    plan = ("plan", "--model", "normed.py:make", "--cluster", "8xcpu", *pins)
    code, _, err = run(*plan)
    assert code == 2 and 'or batch_stats="microbatch"' in err
    code, out, err = run(*plan, "--batch-stats", "microbatch")
    assert code == 0 and "taken over each of 4 microbatches" in out, err
    code, out, err = run("run", "p.json", "--steps", "2", "--verify")
    assert code == 0 and "equals the unsharded step, run microbatch by microbatch" in out, err


@pytest.mark.parametrize(
    ("name", "complaint"), [("fails", "ValueError: no data here"), ("asks", "missing 1 required")]
)
def test_what_goes_wrong_in_a_users_file_is_said_with_its_line(run, tmp_path, name, complaint):
    (tmp_path / "own.py").write_text(STEPS)
    code, _, err = run("plan", "--model", f"own.py:{name}", "--cluster", "8xcpu")
    assert code == 2 and complaint in err and "Traceback" not in err


def test_a_step_without_state_cannot_be_trained(run, tmp_path):
    (tmp_path / "own.py").write_text(STEPS)
    assert (
        run("plan", "--model", "own.py:stateless", "--cluster", "8xcpu", *QUICK, "-o", "p.json")[0]
        == 0
    )
    code, _, err = run("run", "p.json")
    assert code == 2 and "does not return its state first" in err


def test_a_state_that_changes_its_type_cannot_be_trained(run, tmp_path):
    (tmp_path / "own.py").write_text(STEPS)
    plan = ("plan", "--model", "own.py:retyped", "--cluster", "8xcpu", *QUICK, "-o", "p.json")
    assert run(*plan)[0] == 0
    code, _, err = run("run", "p.json")
    assert code == 2 and "takes `state` as float32 and returns it as bfloat16" in err


@pytest.mark.parametrize("seed", ["-1", str(2**63)])
def test_seeds_that_jax_does_not_take_are_refused(run, seed):
    code, _, err = run("run", "--model", "gpt-tiny", "--devices", "8", "--seed", seed)
    assert code == 2 and "--seed" in err and "Traceback" not in err


def test_a_file_without_its_function_is_told_apart_from_the_zoo(run, tmp_path):
    (tmp_path / "own.py").write_text(STEPS)
    code, _, err = run("plan", "--model", "own.py", "--cluster", "8xcpu")
    assert code == 2 and "FILE.py:FUNCTION" in err and "gpt" not in err


@pytest.mark.parametrize(
    "damage",
    [
        lambda plan: plan.update(microbatches=5),
        lambda plan: plan.update(recompute="full"),
        lambda plan: plan["strategies"].clear(),
        lambda plan: plan.pop("checksum"),
    ],
)
def test_a_plan_that_was_changed_is_refused(run, plan_file, tmp_path, damage):
    data = json.loads((tmp_path / plan_file).read_text())
    damage(data)
    (tmp_path / plan_file).write_text(json.dumps(data))
    code, out, err = run("run", plan_file)
    assert code == 2 and "changed or damaged" in err and not out


def test_a_link_stays_a_link_and_nothing_half_written_stays(run, tmp_path, monkeypatch):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    assert (
        run("plan", "--model", "gpt-tiny", "--cluster", "8xcpu", *QUICK, "-o", "link.json")[0] == 0
    )
    assert (tmp_path / "link.json").is_symlink() and load_plan(tmp_path / "real.json")
    before = sorted(p.name for p in tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    code, _, err = run(
        "plan", "--model", "gpt-tiny", "--cluster", "8xcpu", *QUICK, "-o", "other.json"
    )
    assert code == 2 and "No space left" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


MISTAKES = [
    (2, "no such command", ("plam",)),
    (2, "no such option", ("plan", "--modle", "gpt2", "--cluster", "8xcpu")),
    (2, "missing option", ("plan", "--model", "gpt2")),
    (2, "no model is named", ("plan", "--model", "gpt5", "--cluster", "8xcpu")),
    (2, "has no option", ("plan", "--model", "dlrm-tiny", "--cluster", "8xcpu", "--layers", "3")),
    (2, "cannot be 0", ("plan", "--model", "gpt-tiny", "--cluster", "8xcpu", "--global-batch", "0")),
    (2, "mesh cannot be `a`", ("plan", "--model", "gpt-tiny", "--cluster", "8xcpu", "--mesh", "a")),
    (2, "has 6 devices", ("plan", "--model", "gpt-tiny", "--cluster", "8xcpu", "--mesh", "2x3")),
    (2, "cannot be cut into 5", ("plan", "--model", "gpt-tiny", "--cluster", "8xcpu", "--microbatches", "5")),
    (2, "search cannot be 'best'", ("plan", "--model", "gpt-tiny", "--cluster", "8xcpu", "--search", "best")),
    (2, "chunks cannot be 2", ("plan", "--model", "gpt-tiny", "--cluster", "8xcpu", "--pp", "2", "--chunks", "2")),
    (
        2, "interleaved has two stages per rank or more, not 1",
        ("plan", "--model", "gpt-tiny", "--cluster", "8xcpu", "--pp", "2", "--schedule", "interleaved", "--chunks=1"),
    ),
    (2, "recompute cannot be 'all'", ("plan", "--model", "gpt-tiny", "--cluster", "8xcpu", "--recompute", "all")),
    (2, "time_limit cannot be -1", ("plan", "--model", "gpt-tiny", "--cluster", "8xcpu", "--time-limit", "-1")),
    (2, "has no unit", ("plan", "--model", "gpt-tiny", "--cluster", "8xcpu", "--memory", "7")),
    (2, "h101", ("plan", "--model", "gpt-tiny", "--cluster", "8xh101")),
    (2, "cannot be written", ("plan", "--model", "gpt-tiny", "--cluster", "8xcpu", "-o", "no/p.json")),
    (2, "no file train.py", ("plan", "--model", "train.py:make", "--cluster", "8xcpu")),
    (2, "cannot be read", ("show", "nothing.json")),
    (2, "no model is named", ("models", "gpt5")),
    (2, "only this machine", ("clusters", "8xcpu", "--measure")),
    (2, "memory cannot be", ("plan", "--model", "gpt-tiny", "--cluster", "8xcpu", "--memory", "300GiB")),
    (2, "no ordinary file", ("plan", "--model", "gpt-tiny", "--cluster", "8xcpu", "-o", "/dev/null")),
    (2, "cannot be read", ("solve", "nothing.json")),
    (2, "time limit", ("solve", "nothing.json", "--time-limit", "0")),
    (3, "no plan fits", ("plan", "--model", "gpt-tiny", "--cluster", "8xcpu", "--memory", "100KiB")),
]  # fmt: skip


@pytest.mark.parametrize(("code", "complaint", "words"), MISTAKES, ids=lambda x: str(x)[:28])
def test_mistakes_end_in_a_house_error_and_no_file(run, tmp_path, code, complaint, words):
    found, out, err = run(*words)
    assert found == code, err
    assert complaint in err.lower() and "try" in err and "Traceback" not in err
    assert out == "" and os.listdir(tmp_path) == []


def test_a_plan_that_cannot_run_here_or_belongs_elsewhere_is_refused(run, plan_file, tmp_path):
    plan = load_plan(tmp_path / plan_file)
    save_plan(plan.model_copy(update={"recipe": {"model": "gpt-tiny", "seq": 16}}), "other.json")
    data = json.loads((tmp_path / plan_file).read_text())
    code, _, err = run("run", "other.json")
    assert code == 5 and "was made for graph" in err
    (tmp_path / "old.json").write_text(json.dumps({**data, "version": 0}))
    assert run("show", "old.json")[0] == 5
    (tmp_path / "unmade.json").write_text(json.dumps({**data, "recipe": {}}))
    assert run("run", "unmade.json")[0] == 2
    run(
        "plan",
        "--model",
        "gpt-tiny",
        "--cluster",
        "16xcpu",
        *("--mesh", "16", "--time-limit", "20"),
        "-o",
        "big.json",
    )
    code, _, err = run("run", "big.json")
    assert code == 5 and "16 devices are asked for, and jax already runs with 8" in err
    code, _, err = run("run", plan_file, "--data", plan_file)
    assert code == 2 and "does not read bytes" in err


STEP = """
import jax, jax.numpy as jnp

def step(params, batch):
    loss, grad = jax.value_and_grad(lambda p: jnp.mean((batch @ p) ** 2))(params)
    return params - 0.1 * grad, {"loss": loss}

def make():
    return step, jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((32, 64), jnp.float32)

def wrong():
    return 7
"""


def test_a_step_of_the_users_own_file_is_planned_run_and_audited(run, tmp_path):
    (tmp_path / "train.py").write_text(STEP)
    code, out, err = run("plan", "--model", "train.py:make", "--cluster", "8xcpu", "-o", "p.json")
    assert code == 0 and out.startswith("make on 8xcpu"), err
    assert run("run", "p.json", "--steps", "2", "--verify")[0] == 0
    assert run("audit", "p.json")[0] == 0
    for words, complaint in (
        (("train.py:nothing",), "no function"),
        (("train.py:wrong",), "returned a int"),
        (("train.py:make", "--layers", "3"), "for models of the zoo"),
    ):
        code, _, err = run("plan", "--cluster", "8xcpu", "--model", *words)
        assert code == 2 and complaint in err


def test_an_interrupt_returns_the_best_plan_so_far(tmp_path):
    """Ctrl-C while gpt3-13b is searched: a plan with its gap, saved, and exit code 0."""
    words = (
        "plan",
        "--model",
        "gpt3-13b",
        "--cluster",
        "16xa100x8@hdr200",
        "--layers",
        "4",
        "--time-limit",
        "300",
        "--gap",
        "0",
    )
    command = [sys.executable, "-m", "meshwright", *words, "-o", str(tmp_path / "p.json")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes)
    for line in process.stderr:
        if line.startswith("  mesh"):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "stopped by interrupt" in out
    assert load_plan(tmp_path / "p.json").proof.stopped_by == "interrupt"


def test_an_interrupt_before_any_plan_exits_130(tmp_path):
    words = (
        "plan",
        "--model",
        "gpt3-175b",
        "--cluster",
        "128xa100x8@hdr200",
        "-o",
        str(tmp_path / "p.json"),
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-m", "meshwright", *words], **pipes)
    for line in process.stderr:
        if line.startswith("tracing"):
            break
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and not out
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("model", ["gpt-tiny", pytest.param("gpt-bytes", marks=pytest.mark.slow)])
def test_the_demo_shows_plan_losses_and_audit(run, tmp_path, monkeypatch, model):
    monkeypatch.setattr(demo, "MODEL", model)
    (tmp_path / "text.txt").write_text("so much depends upon a red wheel barrow " * 500)
    code, out, err = run("demo", "--steps", "3", "--no-large", "--data", "text.txt")
    assert code == 0, err
    for part in (
        "20,000 bytes of text.txt",
        "proof",
        "losses",
        "largest relative difference of 3 steps",
        "audit",
    ):
        assert part in out
    worst = float(out.partition("of 3 steps: ")[2].partition(",")[0])
    assert worst < 1e-3
    code, _, err = run("demo", "--data", "nothing.txt")
    assert code == 2 and "cannot be read" in err
