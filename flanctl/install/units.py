"""The units' texts, of packaging/systemd: in the frozen file they are a part of it."""

from __future__ import annotations

from pathlib import Path

from flanctl.errors import NotFound


def unit(name: str) -> str:
    """Raises NotFound where flanctl was installed as a Python package, without them."""
    try:
        from flanctl._compiled import UNITS
    except ImportError:
        pass
    else:
        return str(UNITS[name])
    checkout = Path(__file__).parents[2]  # the frozen file's modules have no such name
    try:
        return (checkout / "packaging" / "systemd" / name).read_text()
    except FileNotFoundError:
        raise NotFound(
            f"this flanctl has no {name} with it",
            hint="use the one-file flanctl, or the deb or rpm",
        ) from None
