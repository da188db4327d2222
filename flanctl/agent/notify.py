"""sd_notify(3): telling systemd that we are ready, what we wait for, and that we stop. Outside systemd: nothing."""

from __future__ import annotations

import os
import socket


class Notify:
    """One datagram per call to $NOTIFY_SOCKET; failures are ignored, as sd_notify's callers do."""

    def __init__(self, address: str | None = None) -> None:
        path = os.environ.get("NOTIFY_SOCKET", "") if address is None else address
        # An abstract socket is written with @ in the variable and with NUL in the system call.
        self._address = "\0" + path[1:] if path.startswith("@") else path

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nSTATUS={status}")

    def waiting(self, text: str, *, seconds: float) -> None:
        """Say what we wait for and ask for `seconds` more before systemd gives up on us."""
        self._send(f"STATUS={text}\nEXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def stopping(self) -> None:
        self._send("STOPPING=1\nSTATUS=stopping")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                channel.sendto(text.encode(), self._address)
        except OSError:
            pass
