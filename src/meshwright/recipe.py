"""Steps that the command line can name: the zoo's models, and functions in a user's file.

gpt3-175b                     a model of the zoo, with --global-batch and so on
train.py:make                 `make()` returns an object with `step`, `state` and `batch`,
                              or a tuple (step, *arguments); arrays or jax.ShapeDtypeStruct
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .backends.xla.capture import Captured
from .graph_file import is_graph_file
from .ir.errors import UsageError
from .ir.files import MIB, FileKind, is_file, read_bytes
from .models import Example, ModelError, build
from .told import batch_told, parse_batch_args
from .tracing import Options

FILE = FileKind("file", 16 * MIB, "FILE.py:FUNCTION")
Recipe = Mapping[str, str | int | bool]  # as kept in `Plan.recipe`


@dataclass(frozen=True)
class Made:
    """A step and its (abstract) arguments. `example` is there for models of the zoo."""

    name: str
    step: Callable[..., Any]
    args: tuple[Any, ...]
    recipe: Recipe
    example: Example | None = None

    def capture(self, stages: bool = False) -> Captured:
        """Trace it; the state (first argument) is donated, as training loops do. `stages` as for `Options.capture`."""
        told = self.recipe.get("batch_argnums")
        return batch_told(
            self._captured(stages), self.step, None if told is None else parse_batch_args(str(told))
        )

    def _captured(self, stages: bool) -> Captured:
        options = Options(donate_argnums=(0,))
        if self.example is not None:
            return options.capture(self.step, self.args, {}, stages)
        try:
            return options.capture(self.step, self.args, {}, stages)
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise UsageError(
                f"the step ended Python: {type(error).__name__}: {_text(error):.500}.", where=self.name,
                fix="a step that returns (state, metrics)",
            ) from error  # fmt: skip


def make(recipe: Recipe) -> Made:
    """Build the step that a recipe names.

    Raises:
        UsageError: no such model, option, file or function.
    """
    options = {
        name: value for name, value in recipe.items() if name not in ("model", "batch_argnums")
    }
    if "model" not in recipe:
        raise UsageError(
            "the plan's recipe names no model.", fix="plan again; plans are not edited by hand"
        )
    model = str(recipe["model"])
    if is_graph_file(model):
        raise UsageError(
            f"{model:.200} is a graph, which says nothing of the arrays that a run needs.",
            fix="a plan of the model itself; graphs are planned, simulated and shown",
        )
    if ".py:" in model:
        return _from_file(model, options, recipe)
    if model.endswith(".py"):
        raise UsageError(
            f"{model:.200} is a file; which of its functions makes the step is not said.",
            fix="FILE.py:FUNCTION",
        )
    try:
        example = build(model, **options)  # type: ignore[arg-type]
    except ModelError as error:
        raise UsageError(error.what, where=error.where, fix=error.hint) from error
    except TypeError as error:
        raise UsageError(
            f"{model} cannot be built: {error}.", fix="options of `meshwright plan --help`"
        ) from error
    return Made(example.name, example.step, (example.state, example.batch), recipe, example)


def _from_file(model: str, options: Mapping[str, Any], recipe: Recipe) -> Made:
    if options:
        raise UsageError(
            f"--{next(iter(options))} is for models of the zoo.",
            where=model,
            fix="set it in the function that makes the step",
        )
    path, _, name = model.rpartition(":")
    function = getattr(_module(Path(path)), name, None)
    if not callable(function):
        raise UsageError(f"{path:.200} has no function `{name:.60}`.", fix="FILE.py:FUNCTION")
    with _blamed(
        f"`{name}()` failed",
        Path(path),
        "a function without arguments that returns (step, state, batch)",
    ):
        found: Any = function()
    if isinstance(found, tuple) and len(found) > 1 and callable(found[0]):
        return Made(name, found[0], tuple(found[1:]), recipe)
    if isinstance(found, tuple) or not all(hasattr(found, p) for p in ("step", "state", "batch")):
        raise UsageError(
            f"`{name}()` returned a {type(found).__name__}.",
            where=model,
            fix="return (step, state, batch), or an object with these three",
        )
    return Made(name, found.step, (found.state, found.batch), recipe)


@contextmanager
def _blamed(what: str, path: Path, fix: str) -> Iterator[None]:
    """Whatever a user's file ends with is the file's, an exit of Python's included; Ctrl-C stays what it is."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        text = f"{type(error).__name__}: {_text(error):.500}"
        raise UsageError(
            f"{what}: {text}.", where=_line_in(error, path) or str(path), fix=fix
        ) from error


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # an error of the user's whose text fails as well
        return "its text cannot be had"


def _line_in(error: BaseException, path: Path) -> str:
    """Where in the user's file an error came from."""
    lines = [
        f.lineno
        for f in traceback.extract_tb(error.__traceback__)
        if f.filename.endswith(path.name)
    ]
    return f"{path}:{lines[-1]}" if lines else ""


def _module(path: Path) -> Any:
    if not is_file(path):
        raise UsageError(f"there is no file {path!s:.200}.", fix="FILE.py:FUNCTION")
    read_bytes(path, FILE)
    known = getattr(sys.modules.get(path.stem), "__file__", str(path)) or ""
    taken = path.stem in sys.stdlib_module_names or Path(known) != path
    name = (
        f"_{path.stem}_of_the_user" if taken else path.stem
    )  # its own name may be that of what others import
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    with _blamed(f"{path} cannot be imported", path, f"python {path}"):
        spec.loader.exec_module(module)
    return module
