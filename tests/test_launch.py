"""The lines that start a plan on its cluster."""

import sys
from pathlib import Path

import pytest

from meshwright.cli import main
from meshwright.cli.launch import Launcher, job, lines
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.codec import save_plan
from meshwright.ir.errors import UsageError
from meshwright.ir.mesh import Mesh


def on(plan, cluster: str, devices: int):
    """The plan, as if it was for so many devices of another cluster."""
    return plan.model_copy(update={"cluster": Cluster.parse(cluster), "mesh": Mesh.of(x=devices)})


def shown(plan, launcher: str, per_host: int = 1) -> str:
    return "\n".join(lines(job(plan, per_host), Launcher(launcher), "meshwright run p.json"))


@pytest.fixture
def wide(small_plan):
    return on(small_plan, "4xh100x8@ib400", 32)


def test_slurm_starts_a_process_on_each_host(wide):
    assert (
        shown(wide, "slurm")
        == "srun --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 meshwright run p.json"
    )
    assert "--ntasks-per-node=8 --gpus-per-node=8" in shown(wide, "slurm", 8)


def test_part_of_a_host_is_one_process(small_plan):
    plan = on(small_plan, "4xh100x8@ib400", 4)
    assert (
        shown(plan, "slurm")
        == "srun --nodes=1 --ntasks-per-node=1 --gpus-per-node=4 meshwright run p.json"
    )
    assert shown(plan, "jax") == "meshwright run p.json"


def test_torchrun_meets_on_the_first_host(wide):
    comment, line = shown(wide, "torchrun", 2).splitlines()
    assert comment == "# on each of the 4 hosts, with HOST0 set to the name of the first"
    assert line == (
        "torchrun --nnodes=4 --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=$HOST0:8476"
        " --no-python meshwright run p.json"
    )


def test_jax_has_a_line_for_each_process(wide):
    rows = shown(wide, "jax").splitlines()
    assert len(rows) == 5
    assert (
        rows[4]
        == "meshwright run p.json --coordinator $HOST0:8476 --processes 4 --process 3  # on host 3"
    )


def test_on_one_host_the_lines_run_as_they_stand(small_plan):
    rows = shown(small_plan, "jax", 2).splitlines()
    assert rows[1:] == [
        "meshwright run p.json --coordinator 127.0.0.1:8476 --processes 2 --process 0 &",
        "meshwright run p.json --coordinator 127.0.0.1:8476 --processes 2 --process 1",
    ]


def test_hosts_are_called_by_their_names(small_plan):
    plan = on(small_plan, "2xh100x8@ib400", 16)
    named = plan.cluster.groups[0].model_copy(update={"names": ("gpu04", "gpu05")})
    plan = plan.model_copy(update={"cluster": plan.cluster.model_copy(update={"groups": (named,)})})
    assert "--nodelist=gpu04,gpu05" in shown(plan, "slurm")
    assert "--rdzv-endpoint=gpu04:8476" in shown(plan, "torchrun")
    assert shown(plan, "jax").endswith(
        "--coordinator gpu04:8476 --processes 2 --process 1  # on gpu05"
    )


@pytest.mark.parametrize(
    "devices, per_host, launcher, message",
    [
        (12, 1, "slurm", "the plan's 12 devices do not fill hosts of 8"),
        (32, 3, "slurm", "8 devices of a host cannot be dealt out to 3 processes"),
        (32, 0, "slurm", "8 devices of a host cannot be dealt out to 0 processes"),
        (32, 2, "jax", "jax's own variables do not say which devices a process has"),
    ],
)
def test_what_does_not_fit_is_refused(small_plan, devices, per_host, launcher, message):
    with pytest.raises(UsageError, match=message):
        shown(on(small_plan, "4xh100x8@ib400", devices), launcher, per_host)


def test_for_unlike_hosts_the_line_of_a_process_is_shown(small_plan):
    cluster = Path(__file__).parent.parent / "benchmarks/clusters/a100_v100.yaml"
    with pytest.raises(
        UsageError,
        match=r"not alike(.|\n)*meshwright run PLAN --coordinator \S+:8476 --processes N",
    ):
        shown(on(small_plan, str(cluster), 24), "slurm", 1)


def test_the_command_prints_lines_to_copy(small_plan, tmp_path, monkeypatch, capsys):
    save_plan(small_plan, tmp_path / "my plan.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "meshwright",
            "launch",
            "my plan.json",
            "--with",
            "slurm",
            "--run",
            "--steps 100 --verify",
        ],
    )
    with pytest.raises(SystemExit):
        main()
    out = capsys.readouterr().out
    assert (
        out
        == "srun --nodes=1 --ntasks-per-node=1 meshwright run 'my plan.json' --steps 100 --verify\n"
    )
