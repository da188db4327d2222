"""`flanctl version`."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Any

import click

from flanctl import __version__, version_line
from flanctl.commands import output
from flanctl.commands.options import output_options, write_out


@click.command()
@output_options
def version() -> None:
    """Print the version.

    With -w json: also the revision it was built from and the version of every part in it.

    \b
    Example:
      flanctl version -w json
    """
    form = write_out()
    if form == "json":
        output.json(about())
    elif form == "simple":
        output.simple([(__version__,)])
    else:
        output.data(version_line())


def about() -> dict[str, Any]:
    """What runs here, part by part. What only a frozen build knows is null elsewhere."""
    import _sqlite3
    import _ssl
    import platform

    try:
        from flanctl import _build  # written by `make freeze`
    except ImportError:
        _build = None  # type: ignore[assignment]
    return {
        "flanctl": __version__,
        "frozen": bool(getattr(sys, "frozen", False)),
        "revision": None if _build is None else _build.REVISION,
        "built": None
        if _build is None
        else datetime.fromtimestamp(_build.EPOCH, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "python": platform.python_version(),
        "openssl": _ssl.OPENSSL_VERSION,
        "sqlite": _sqlite3.sqlite_version,
        **{
            name: _installed(package) if _build is None else _build.PACKAGES[package]
            for name, package in PACKAGES.items()
        },
        "rust": None if _build is None else _build.RUST,
        "sources": None if _build is None else _build.SOURCES,
        "machine": platform.machine(),
    }


def _installed(package: str) -> str:
    from importlib.metadata import version as installed

    return installed(package)


PACKAGES = {
    "click": "click",
    "etcd3": "etcd3",
    "grpc": "grpcio",
    "protobuf": "protobuf",
    "pyroute2": "pyroute2",
    "tabulate": "tabulate",
}
"""Name in the answer → name on PyPI."""
