"""The version of Opsin that is installed, as its package states it."""

from __future__ import annotations

from importlib import metadata

UNKNOWN_VERSION = "unknown"
"""The version where Opsin is imported from a folder and not installed."""


def installed_version() -> str:
    """The version of the installed package, or ``UNKNOWN_VERSION``."""
    try:
        return metadata.version("opsin")
    except metadata.PackageNotFoundError:
        return UNKNOWN_VERSION
