"""What the metadata of installed packages say; read only where something is to be said."""

from __future__ import annotations

import importlib


def release_of(distribution: str) -> str:
    """The release of a package, for a sentence."""
    metadata = importlib.import_module("importlib.metadata")
    try:
        return str(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return "of an unknown release"


def tracker() -> str:
    """Where to report: as the package's metadata say, so that it is written in one place."""
    metadata = importlib.import_module("importlib.metadata")
    try:
        urls = metadata.metadata("tinker-routefix").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        urls = []
    links: dict[str, str] = dict(url.split(", ", 1) for url in urls)
    return links.get("Issues", "the shim's issue tracker")
