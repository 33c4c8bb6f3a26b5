"""The zoo: real training steps, written as a user would, built by name.

    example = build("gpt3-175b", batch=96)
    example.step, example.state, example.batch    # to trace: shapes only
    build("gpt-tiny").init(jax.random.key(0))     # to run: real arrays

A name ending in `-scan` runs its layers with `jax.lax.scan`.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

from .errors import ModelError
from .example import Example

__all__ = ["Example", "ModelError", "build", "describe", "names"]

# Names by module. Here too, so that listing them does not import flax and equinox.
_GPT = (
    *("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"),
    *("gpt3-125m", "gpt3-350m", "gpt3-760m", "gpt3-1.3b"),
    *("gpt3-2.7b", "gpt3-6.7b", "gpt3-13b", "gpt3-175b"),
    *("gpt-tiny", "gpt-bytes"),
)
_MODULES = {
    "gpt": _GPT,
    "llama": ("llama3-8b", "llama3-70b", "llama3-405b", "llama-tiny", "llama-tied-tiny"),
    "mixtral": ("mixtral-8x7b", "mixtral-tiny"),
    "deepseek": ("deepseek-v2", "deepseek-v3", "deepseek-tiny"),
    "vit": ("vit-b16", "vit-l16", "vit-h14", "vit-tiny"),
    "wide_resnet": (
        *("wrn-50-2", "wrn-101-2", "wrn-alpa-250m", "wrn-alpa-500m", "wrn-alpa-1b"),
        *("wrn-alpa-2b", "wrn-alpa-4b", "wrn-alpa-6.8b", "wrn-alpa-13b", "wrn-tiny"),
    ),
    "dlrm": ("dlrm", "dlrm-tiny"),
}
_SCANNED = ("gpt", "llama", "mixtral")  # modules whose layers can also be scanned
_SIZES = ("batch", "seq", "layers")
_CHOICES = {"optimizer": ("adamw", "sgd"), "dtype": ("bf16", "f32")}
_OPTIONS = (*_SIZES, *_CHOICES, "scan", "remat", "dropout")


def names() -> tuple[str, ...]:
    """Every name that `build` takes."""
    return tuple(
        name + suffix
        for module, bases in _MODULES.items()
        for name in bases
        for suffix in (("", "-scan") if module in _SCANNED else ("",))
    )


def build(
    name: str,
    *,
    batch: int | None = None,
    seq: int | None = None,
    layers: int | None = None,
    optimizer: str | None = None,
    dtype: str | None = None,
    scan: bool | None = None,
    remat: bool | None = None,
    dropout: float | None = None,
) -> Example:
    """Build one training step; nothing is materialised, whatever its size.

    Args:
        name: one of `names()`.
        batch: sequences, images or rows of one global batch.
        seq: tokens of one sequence (language models).
        layers: depth (transformers).
        optimizer: "adamw" or "sgd".
        dtype: of the computation, "bf16" or "f32"; parameters are fp32.
        scan: run the layers with `jax.lax.scan`; also spelt `NAME-scan`.
        remat: recompute every layer in the backward pass (`jax.checkpoint`).
        dropout: part of the entries that are zeroed (GPT), 0 or more and below 1.

    An option left at None keeps the published value, or else the zoo's. One
    that the model does not have is refused, not ignored.
    """
    options = {"batch": batch, "seq": seq, "layers": layers, "optimizer": optimizer}
    options |= {"dtype": dtype, "scan": scan, "remat": remat, "dropout": dropout}
    given = {option: value for option, value in options.items() if value is not None}
    base, module = _find(name)
    config = module.CONFIGS[base]
    _check(name, config, given)
    if name != base:
        given["scan"] = True
    suffix = "-scan" if given.get("scan") else ""
    return module.make(base + suffix, replace(config, **given))


def describe(name: str) -> str:
    """One line: what the model is, its parameters and its batch."""
    example = build(name)
    batch = ", ".join(f"{part} {leaf.shape}" for part, leaf in example.batch.items())
    return f"{name}: {example.description}; {example.params:,} parameters; batch {batch}"


def _find(name: str) -> tuple[str, ModuleType]:
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=3, cutoff=0.4) or names()
        raise ModelError(
            f"No model is named {name!r}.",
            where=f"build({name!r})",
            hint=", ".join(close),
        )
    base = name.removesuffix("-scan")
    module = next(module for module, bases in _MODULES.items() if base in bases)
    return base, _import(name, module)


def _import(name: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(f".{module}", __name__)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{name!r} needs the package {error.name!r}, which is not installed.",
            where=f"build({name!r})",
            hint="pip install 'meshwright[models]'",
        ) from error


def _check(name: str, config: Any, given: dict[str, Any]) -> None:
    known = [field.name for field in fields(config) if field.name in _OPTIONS]
    for option, value in given.items():
        where = f"build({name!r}, {option}={value!r})"
        if option not in known:
            raise ModelError(
                f"{name!r} has no option {option!r}.", where=where, hint=", ".join(known)
            )
        if option in _CHOICES and value not in _CHOICES[option]:
            raise ModelError(
                f"{option!r} cannot be {value!r}.",
                where=where,
                hint=" or ".join(map(repr, _CHOICES[option])),
            )
        if option in _SIZES and value < 1:
            raise ModelError(f"{option!r} cannot be {value}.", where=where, hint="1 or more")
        if option == "dropout" and not 0 <= value < 1:
            raise ModelError(
                f"{option!r} cannot be {value}.", where=where, hint="from 0 to below 1"
            )
    if name.endswith("-scan") and given.get("scan") is False:
        raise ModelError(
            f"{name!r} is scanned by name, and scan=False contradicts it.",
            where=f"build({name!r}, scan=False)",
            hint=f"build({name.removesuffix('-scan')!r})",
        )
