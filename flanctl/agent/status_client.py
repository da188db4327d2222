"""Asking the agent of this host over its socket.

document = ask(Path("/run/flanctl/agent.sock"))     # NoAgent, Silent or NotPermitted say which of the three it is
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from typing import TYPE_CHECKING, Any

from flanctl.errors import FlanctlError, Invalid, NotFound, NotPermitted

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = 3.0
"""For the whole question; an agent answers within a few milliseconds."""
LIMIT = 4 * 1024 * 1024


class NoAgent(NotFound):
    """Nobody listens: there is no socket, or it is a dead agent's."""

    default_id = "agent-missing"


class Silent(FlanctlError):
    """Somebody listens and does not answer."""

    default_id = "agent-silent"


def ask(path: Path, *, seconds: float = SECONDS) -> dict[str, Any]:
    """The agent's `/status`. Raises NoAgent, Silent, NotPermitted, or Invalid for an answer that is no agent's."""
    deadline = time.monotonic() + seconds
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as channel:
        _connect(channel, path, seconds)
        try:
            channel.sendall(b"GET /status HTTP/1.1\r\nHost: agent\r\n\r\n")
            answer = _read(channel, deadline)
        except TimeoutError:
            raise Silent(f"the agent at {path} does not answer within {seconds:g} s") from None
        except OSError as error:
            raise Silent(f"the agent at {path} closed the connection: {error.strerror}") from None
    head, _, body = answer.partition(b"\r\n\r\n")
    try:
        status = int(head.split(maxsplit=2)[1])
        document = json.loads(body)
    except (ValueError, IndexError, RecursionError):
        raise Invalid(f"who answers at {path} is no flanctl agent") from None
    if status != 200 or not isinstance(document, dict) or not isinstance(document.get("state"), str):
        raise Invalid(f"who answers at {path} is no flanctl agent of our kind (HTTP status {status})")
    return document


def _connect(channel: socket.socket, path: Path, seconds: float) -> None:
    try:
        folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        raise NotPermitted(f"no right to look into {path.parent}", hint="run it as root") from None
    except OSError:
        raise NoAgent(f"{path} is missing") from None
    try:
        channel.settimeout(seconds)
        # By way of the descriptor: an address holds 107 bytes, a path may be longer.
        channel.connect(f"/proc/self/fd/{folder}/{path.name}")
    except FileNotFoundError:
        raise NoAgent(f"{path} is missing") from None
    except PermissionError:
        raise NotPermitted(f"only root may ask the agent at {path}", hint="run it as root") from None
    except OSError as error:
        if error.errno == errno.ECONNREFUSED:
            raise NoAgent(f"nobody listens at {path}") from None
        if (
            isinstance(error, TimeoutError) or error.errno == errno.EAGAIN
        ):  # its queue is full: it accepts nobody
            raise Silent(f"the agent at {path} takes no connection") from None
        raise NoAgent(f"{path} is no socket: {error.strerror}") from None
    finally:
        os.close(folder)


def _read(channel: socket.socket, deadline: float) -> bytes:
    """Until the agent closes. Raises TimeoutError at the deadline, which a drip does not move."""
    parts, size = [], 0
    while size <= LIMIT:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        channel.settimeout(left)
        part = channel.recv(65536)
        if not part:
            break
        parts.append(part)
        size += len(part)
    return b"".join(parts)
