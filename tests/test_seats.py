"""Which of how many processes this is, from what was said or from the environment."""

from __future__ import annotations

import pytest

from meshwright.ir.cluster.host_lists import MOST, host_names, hosts_in
from meshwright.ir.errors import UsageError
from meshwright.seats import Seat, first_host, seat

SLURM = {
    "SLURM_JOB_ID": "4100", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "4", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "node[007-009,012],login1",
}  # fmt: skip
TORCH = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
JAX = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
INTERACTIVE = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}


def without(env, *names):
    return {name: value for name, value in env.items() if name not in names}


@pytest.mark.parametrize(
    "env, found",
    [
        (JAX, Seat("h:1", 2, 1)),
        (TORCH, Seat("10.0.0.1:29500", 4, 3)),
        (TORCH | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, Seat("10.0.0.1:29501", 4, 3)),
        (TORCH | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Seat("10.0.0.1:29500", 4, 3, 1, 2)),
        (SLURM, Seat("node007:61444", 8, 5, 1, 2)),
        (
            SLURM | {"SLURM_STEP_NODELIST": "rack[1-2]node[03,05]-ib"},
            Seat("rack1node03-ib:61444", 8, 5, 1, 2),
        ),
        (SLURM | JAX, Seat("h:1", 2, 1)),
        (SLURM | TORCH, Seat("10.0.0.1:29500", 4, 3)),
        (INTERACTIVE | TORCH, Seat("10.0.0.1:29500", 4, 3)),
    ],
)
def test_a_process_finds_its_seat(env, found):
    assert seat(env=env) == found


@pytest.mark.parametrize(
    "env",
    [
        {}, INTERACTIVE, {"SLURM_JOB_ID": "41", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"},
        {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0"},
        {"JAX_NUM_PROCESSES": "1"}, JAX | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        dict.fromkeys(JAX, ""), INTERACTIVE | {"PMI_SIZE": "8"}, {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)  # fmt: skip
def test_what_is_left_of_one_process_says_that_it_is_alone(env):
    assert seat(env=env) is None


@pytest.mark.parametrize(
    "given, message",
    [
        ({"coordinator": "h:1"}, "one is missing"),
        ({"coordinator": "h:1", "processes": 2, "process": 2}, "there is no process 2 of 2"),
        (
            {"coordinator": "h:1", "processes": 10**30, "process": 2},
            "there is no process 2 of 10{30}",
        ),
        ({"coordinator": "h", "processes": 2, "process": 0}, "`h` is no address"),
        ({"coordinator": "h:65536", "processes": 2, "process": 0}, "`h:65536` is no address"),
        ({"env": TORCH | {"RANK": "x"}}, "`x` is no number"),
        ({"env": TORCH | {"RANK": "²"}}, "`²` is no number"),
        ({"env": TORCH | {"RANK": "7" * 400}}, "`7{40}` is no number"),
        ({"env": without(TORCH, "RANK")}, "WORLD_SIZE is set, RANK is not"),
        ({"env": {"RANK": "1"}}, "RANK is set, WORLD_SIZE and MASTER_ADDR and MASTER_PORT are not"),
        ({"env": TORCH | {"WORLD_SIZE": "1"}}, "there is no process 3 of 1"),
        (
            {"env": TORCH | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}},
            "there is no process 2 of 2 on a host",
        ),
        (
            {"env": without(JAX, "JAX_PROCESS_ID")},
            "JAX_COORDINATOR_ADDRESS is set, JAX_PROCESS_ID is not",
        ),
        ({"env": {"JAX_NUM_PROCESSES": "2"}}, "JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID are not"),
        ({"env": JAX | {"JAX_PROCESS_ID": ""}}, "JAX_PROCESS_ID is not"),
        ({"env": JAX | TORCH}, "jax's variables say process 1 of 2, torchrun's say process 3 of 4"),
        ({"env": without(SLURM, "SLURM_PROCID")}, "SLURM_PROCID is not"),
        ({"env": SLURM | {"SLURM_STEP_NUM_NODES": "0"}}, "8 tasks do not fill 0 nodes"),
        ({"env": SLURM | {"SLURM_STEP_NODELIST": "n[1-"}}, "is not a pattern of hosts"),
        ({"env": {"OMPI_COMM_WORLD_SIZE": "4"}}, "mpirun started 4 processes"),
    ],
)
def test_seats_that_cannot_be_are_refused(given, message):
    with pytest.raises(UsageError, match=message):
        seat(**{"env": {}, **given})


@pytest.mark.parametrize(
    "text, names",
    [
        ("a1", "a1"),
        ("a1,b2", "a1 b2"),
        ("n[3,5-7]", "n3 n5 n6 n7"),
        ("n[08-11],m1", "n08 n09 n10 n11 m1"),
        ("n[1-3]-ib", "n1-ib n2-ib n3-ib"),
        ("rack[1-2]node[03,05]", "rack1node03 rack1node05 rack2node03 rack2node05"),
        ("a[1-2]b[1]c[01-02]d", "a1b1c01d a1b1c02d a2b1c01d a2b1c02d"),
    ],
)
def test_lists_of_hosts_are_read_as_slurm_writes_them(text, names):
    assert [*hosts_in(text)] == names.split()
    assert first_host(text) == names.split()[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "n[",
        "n[1-2",
        "n]1[",
        "n[[1-2]]",
        "n[]",
        "n[2-1]",
        "n[a-b]",
        "n[1-99999999]",
        "n[²]",
        "n[1-2]]",
    ],
)
def test_what_is_no_list_of_hosts_is_refused(text):
    with pytest.raises(UsageError, match="is not a pattern of hosts"):
        host_names(text)


def test_lists_of_hosts_are_bounded():
    with pytest.raises(UsageError, match=f"names more than {MOST} hosts"):
        host_names("a[1-1000]b[1-1000]c[1-1000]d[1-1000]")
    with pytest.raises(UsageError, match=f"names more than {MOST} hosts"):
        host_names([f"a{k}-[1-60000]" for k in range(10**6)])
