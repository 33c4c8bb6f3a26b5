"""Eight emulated CPU devices for every test, and golden files."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs run once, so that code is hardly worth optimizing; what XLA does with the graph is as ever. One module for
# all code and, where there is still a choice, the older emitter of fusions compile in half the time.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10."),
)

import jax
import pytest
from hypothesis import settings

from .selected import SELECTED

# What lives grows with each test, and a full collection looks at all of it: fewer of them, and none of the libraries.
gc.freeze()
gc.set_threshold(50_000, 20, 100)

jax.config.update("jax_num_cpu_devices", 8)
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")

# A runner started in the background ignores Ctrl-C, and so would all its children.
signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write golden files instead of comparing"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the cases that are not selected to `make test-all`."""
    cases: dict[str, dict[str, pytest.Item]] = defaultdict(dict)
    for item in items:
        name, _, case = item.nodeid.partition("[")  # an id may have a slash
        test = name.rpartition("/")[2]
        if test in SELECTED:
            cases[test][case.removesuffix("]")] = item
    whole = not any("[" in asked for asked in config.args)  # or single cases, by their names
    for test, found in cases.items():
        for case, item in found.items():
            if case not in SELECTED[test]:
                item.add_marker(pytest.mark.slow)
        if whole and not found.keys() >= set(SELECTED[test]):
            raise pytest.UsageError(
                f"tests/selected.py names cases that {test} has not: {sorted(found)}"
            )


class Golden:
    """Compares with the text file of the test's own name."""

    def __init__(self, path: Path, update: bool):
        self.path, self.update = path, update

    def __eq__(self, found: object) -> bool:
        if self.update:
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text(str(found))
        return self.path.read_text() == str(found)

    def __repr__(self) -> str:
        return self.path.read_text()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(GOLDEN / f"{request.node.name}.txt", request.config.getoption("--update-golden"))


@pytest.fixture
def ctrl_c():
    """`ctrl_c(0.5)`: as if the user pressed Ctrl-C half a second from now."""

    def press() -> None:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    return lambda after: threading.Timer(after, press).start()


@pytest.fixture(scope="session")
def small_plan():
    """A plan of the tiny GPT on eight CPU devices."""
    from meshwright.api import plan
    from meshwright.models import build
    from meshwright.planner.request import Request

    example = build("gpt-tiny")
    request = Request(mesh=(8,), microbatches=1, recompute="none", time_limit=20)
    return plan(
        example.step, example.state, example.batch, cluster="8xcpu", request=request,
        donate_argnums=0,
    )  # fmt: skip
