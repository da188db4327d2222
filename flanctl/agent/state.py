"""What a host remembers over a reboot: its subnet, and a random instance id that unmasks cloned machines."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass
from ipaddress import IPv4Network
from typing import TYPE_CHECKING

from flanctl.errors import Invalid, NotPermitted
from flanctl.files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

FILE = "state.json"
_INSTANCE_BYTES = 16


@dataclass(frozen=True, slots=True)
class State:
    """One agent's memory. `prefix` says which network `subnet` belongs to."""

    instance: str
    prefix: str | None = None
    subnet: IPv4Network | None = None

    @classmethod
    def new(cls) -> State:
        return cls(secrets.token_hex(_INSTANCE_BYTES))


def load(folder: Path) -> State | None:
    """The state, or None if there is none yet. Raises Invalid for one that cannot be read (rebuild it then)."""
    path = folder / FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except PermissionError:
        raise NotPermitted(f"no right to read {path}") from None
    except OSError as error:
        raise Invalid(f"cannot read {path}: {error.strerror}") from None
    try:
        raw = json.loads(content)
        subnet = raw["subnet"]
        state = State(raw["instance"], raw["prefix"], None if subnet is None else IPv4Network(subnet))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Invalid(f"state file {path} cannot be understood ({type(error).__name__})") from None
    if not isinstance(state.instance, str) or not isinstance(state.prefix, str | None):
        raise Invalid(f"state file {path} cannot be understood (wrong types)")
    return state


def save(folder: Path, state: State) -> None:
    """On disk when this returns. Raises what `write_atomically` raises."""
    raw = asdict(state) | {"subnet": None if state.subnet is None else str(state.subnet)}
    write_atomically(folder / FILE, json.dumps(raw, sort_keys=True).encode() + b"\n", mode=0o600)
