"""The version that plans and caches carry."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("meshwright")
except PackageNotFoundError:  # run from a source tree that was never installed
    VERSION = "0+unknown"
