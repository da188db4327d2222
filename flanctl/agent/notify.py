"""sd_notify(3): telling systemd that we are ready, what we wait for, that we live, and that we stop.

Outside systemd: nothing.
"""

from __future__ import annotations

import os
import socket

from flanctl.text import printable


class Notify:
    """One datagram per call to $NOTIFY_SOCKET; failures are ignored, as sd_notify's callers do.

    Texts may hold the registry's words: a line end in them must not become an assignment (`MAINPID=1`).
    """

    def __init__(self, address: str | None = None, *, watchdog: float | None = None) -> None:
        path = os.environ.get("NOTIFY_SOCKET", "") if address is None else address
        # An abstract socket is written with @ in the variable and with NUL in the system call.
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self.watchdog = watchdog_seconds() if watchdog is None else watchdog
        """After so many seconds without `alive` systemd kills us; 0 where it does not watch."""

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nSTATUS={printable(status)}")

    def status(self, text: str) -> None:
        """The line `systemctl status` shows."""
        self._send(f"STATUS={printable(text)}")

    def alive(self) -> None:
        """The watchdog's sign of life: only whoever has seen the loop turn may send it."""
        if self.watchdog:
            self._send("WATCHDOG=1")

    def waiting(self, text: str, *, seconds: float) -> None:
        """Say what we wait for and ask for `seconds` more before systemd gives up on us."""
        self._send(f"STATUS={printable(text)}\nEXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def stopping(self) -> None:
        self._send("STOPPING=1\nSTATUS=stopping")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                # The loop's thread must not hang on a systemd that does not read; a lost sign of life comes again.
                channel.setblocking(False)
                channel.sendto(text.encode(), self._address)
        except OSError:
            pass


def watchdog_seconds() -> float:
    """systemd's WatchdogSec= for this process, 0 without one (sd_watchdog_enabled(3))."""
    wanted, who = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if who and who != str(os.getpid()):
        return 0.0  # a child of whoever is watched inherits the variables
    return int(wanted) / 1_000_000 if wanted.isascii() and wanted.isdigit() and len(wanted) < 16 else 0.0
