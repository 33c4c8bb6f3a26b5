"""The version that plans and caches carry."""

from importlib.metadata import PackageNotFoundError, version


def _version() -> str:
    try:
        return version("meshwright")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"


VERSION = _version()
