"""The house's plan: who may import whom, where files lie, what a wheel holds."""

import ast
import re
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("ir", "planner", "backends", "models", "src/meshwright")
MAY_IMPORT = {  # of a folder; a room within one that has a line of its own
    "ir": {"ir"},
    "planner": {"ir", "planner"},
    "backends": {"ir", "backends"},
    "backends/runtime": {"ir", "backends/runtime"},
    "backends/torch": {"ir", "backends/runtime", "backends/torch"},
    "backends/xla": {"ir", "backends/runtime", "backends/xla"},
    "models": {"models"},
    "front": {"ir", "planner", "backends", "models", "front"},
}
THIRD_PARTIES = {
    "ir": {"numpy", "pydantic", "yaml", "sympy", "networkx", "jax"},  # jax: detecting devices only
    "planner": {
        "numpy",
        "numba",
        "scipy",
        "filelock",
        "highspy",
        "pydantic",
    },
    "backends": set(),
    "backends/runtime": {"numpy"},
    "backends/torch": {"numpy", "torch"},
    "backends/xla": {"numpy", "jax"},
    "models": {"numpy", "jax", "flax", "optax", "equinox", "torch"},
    "front": {"numpy", "jax", "torch", "typer", "rich"},
}


def sources():
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if not any(part.is_symlink() for part in file.parents):
                yield file


def module_of(file: Path) -> tuple[str, ...]:
    """("planner", "search") for planner/search/search.py; the front door's files are ("front", ...)."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = ("front", *parts[2:]) if parts[0] == "src" else parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports_of(file: Path):
    """Modules of this project that a file imports, lazily or not, and outside packages."""
    here = module_of(file)
    package = here if file.name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((None, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield None, (node.module or "").split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            yield _target(package, node), None


def _target(package: tuple[str, ...], node: ast.ImportFrom) -> tuple[str, ...]:
    """Relative imports, with the real folders seen where their links are."""
    up = node.level - 1
    real = ("", *package) if package[0] != "front" else package
    base = real[: len(real) - up] if up else real
    parts = (*base, *(node.module or "").split("."))
    parts = tuple(part for part in parts if part)
    if package[0] == "front" and parts[0] == "front" and len(parts) > 1 and parts[1] in MAY_IMPORT:
        return parts[1:]
    return parts


def places_of(module: tuple[str, ...]) -> set[str]:
    """{"backends", "backends/runtime"} for a module of that room."""
    return {module[0], "/".join(module[:2])}


@pytest.mark.parametrize("file", sources(), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_run_downward(file):
    here = max(places_of(module_of(file)) & MAY_IMPORT.keys(), key=len)
    for ours, theirs in imports_of(file):
        if ours:
            assert places_of(ours) & MAY_IMPORT[here], f"{file} imports {'.'.join(ours)}"
        elif theirs not in sys.stdlib_module_names:
            assert theirs in THIRD_PARTIES[here], f"{file} imports {theirs}"


def test_there_are_no_import_cycles():
    """Within the core, imports for types alone and those made late count too."""
    files = {module_of(file): file for file in sources()}
    graph = {module: set() for module in files}
    for module, file in files.items():
        tree = ast.parse(file.read_text())
        package = module if file.name == "__init__.py" else module[:-1]
        for node in ast.walk(tree) if module[0] in ("ir", "planner") else tree.body:
            if isinstance(node, ast.ImportFrom) and node.level:
                target = _target(package, node)
                for name in node.names:
                    found = (*target, name.name) if (*target, name.name) in files else target
                    if found in files and found != module:
                        graph[module].add(found)
    list(TopologicalSorter(graph).static_order())


# ---------------------------------------------------------------- one place decides where a collective goes

DECIDE = {"reshard", "operand_sharding", "result_sharding", "side_sharding", "settled_axes"}
EMIT = {  # file -> what tells it to send
    "backends/torch/collectives.py": "ops of the local program",
    "backends/torch/handover.py": "moves of the rank programs",
    "backends/xla/collectives.py": "ops of the local program",
    "backends/xla/emit_composite.py": "joints of an op of the local program",
    "backends/xla/emit_ring.py": "joints of an op of the local program",
    "backends/xla/everywhere.py": "results that all processes shall read",
    "backends/xla/handover.py": "moves of the rank programs",
    "backends/xla/joins.py": "ops of the local program",
    "backends/xla/measure.py": "measurements",
    "backends/xla/microbench.py": "measurements",
    "backends/xla/single.py": "the schedule of a pipeline as a single program",
}
SENDS = {
    "jax.lax": {
        *("psum", "psum_scatter", "pmax", "pmin", "pmean", "ppermute", "pshuffle", "pbroadcast"),
        *("all_gather", "all_to_all"),
    },
    "torch.distributed": {
        *("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "broadcast"),
        *("reduce_scatter_tensor", "all_to_all", "all_to_all_single"),
        *("send", "recv", "isend", "irecv", "P2POp"),
    },
}
CALLED = {"jax.lax": "lax", "torch.distributed": "dist"}


def _names(file: Path) -> set[str]:
    """What a file names, by import or else."""
    found = set[str]()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add(node.name)
    return found


def _sends(file: Path) -> bool:
    """Whether a file names a collective of jax or torch."""
    for node in ast.walk(ast.parse(file.read_text())):
        for module, names in SENDS.items():
            imported = isinstance(node, ast.ImportFrom) and node.module == module
            if imported and names & {alias.name for alias in node.names}:
                return True
            by_name = isinstance(node, ast.Attribute) and node.attr in names
            if by_name and ast.unparse(node.value).rpartition(".")[2] == CALLED[module]:
                return True
    return False


def test_only_localizing_decides_where_a_collective_goes():
    """Backends neither compare layouts nor ask how an op wants its operands; within `ir` one pass brings values from
    one layout to another. A pipeline as a single program is run in pieces: `backends/xla/single.py` says at which
    borders of passes values are brought to another layout, how they get there the localizer does."""
    for file in sources():
        name = file.relative_to(ROOT)
        if name.parts[0] == "backends":
            assert not DECIDE & _names(file), f"{name} decides: {DECIDE & _names(file)}"
        elif name.parts[0] == "ir" and "reshard" in _names(file):
            assert name.match("ir/passes/localize*.py") or name == Path("ir/sharding.py"), name


def test_what_sends_is_told_to():
    found = {str(file.relative_to(ROOT)) for file in sources() if _sends(file)}
    assert found == EMIT.keys()


def test_links_lead_to_the_real_folders():
    for name in ("ir", "planner", "backends", "models"):
        link = ROOT / "src" / "meshwright" / name
        assert link.is_symlink() and link.resolve() == ROOT / name


def test_every_module_says_what_it_is_for():
    for file in sources():
        text = file.read_text()
        if text.strip() and file.name != "__main__.py":
            assert ast.get_docstring(ast.parse(text)), f"{file} has no docstring"


def test_nothing_names_this_machine_or_leaves_work_undone():
    wrong = re.compile(r"/(work|root|home)/|TO" + r"DO|FIX" + r"ME|X{3}")
    for pattern in (
        "**/*.py",
        "*.md",
        "docs/**/*.md",
        "*/README.md",
        "Makefile",
        ".ci/run",
        "*.toml",
    ):
        for file in ROOT.glob(pattern):
            if ".venv" in file.parts or file.name == "test_layout.py":
                continue
            found = wrong.search(file.read_text())
            assert not found, f"{file}: {found.group() if found else ''}"


@pytest.mark.slow
def test_a_wheel_holds_everything_the_product_needs(tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "-w",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "meshwright/__init__.py", "meshwright/ir/cluster/hardware.yaml", "meshwright/planner/search/search.py",
        "meshwright/backends/xla/lower.py", "meshwright/models/gpt.py", "meshwright/view/html.py",
    ):  # fmt: skip
        assert needed in names
    assert not any(name.startswith(("ir/", "tests/", "planner/")) for name in names)
