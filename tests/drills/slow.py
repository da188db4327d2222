"""A cable that delays: netem's work done by hand, for kernels without it.

    with Slow(lab, host, seconds=0.1):      # every packet to and from the host takes so much longer, each way

The host's eth0 becomes a TAP device with the same address and MAC, its port at the switch another; in between a thread
hands each frame on when its time has come. TAP devices offer no offload, so frames are whole, with their checksums.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Self

from tests.support.namespaces import inside

if TYPE_CHECKING:
    from flanctl.demo.hosts import Host, Lab

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
"""include/uapi/linux/if_tun.h"""
PORT = "slow0"


class Slow:
    """From the beginning of the block to its end; the host has its old cable again then."""

    def __init__(self, lab: Lab, host: Host, *, seconds: float) -> None:
        self._lab, self._host, self._seconds = lab, host, seconds
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run)
        self._ends: list[int] = []

    def __enter__(self) -> Self:
        host, under = self._host, self._lab.underlay
        with inside(host.path):
            with open("/sys/class/net/eth0/address") as file:
                mac = file.read().strip()
        self._routes = host.run(["ip", "-o", "route", "show", "default"]).stdout.strip()
        host.ip_batch("link set eth0 down", "link set eth0 name cable")
        for where, name in ((host, "eth0"), (under, PORT)):
            with inside(where.path):
                self._ends.append(_tap(name))
        host.ip_batch(
            f"link set eth0 address {mac}",
            f"addr add {host.interface} dev eth0 brd +",
            "link set eth0 up",
            f"route replace {self._routes}",
        )
        under.ip_batch(f"link set {PORT} master under0 up")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        for end in (*self._ends, self._stop):
            os.close(end)  # a TAP that nobody holds is gone
        self._host.ip_batch(
            "link set cable name eth0",
            f"addr replace {self._host.interface} dev eth0 brd +",
            "link set eth0 up",
            f"route replace {self._routes}",
        )

    def _run(self) -> None:
        inner, outer = self._ends
        other = {inner: outer, outer: inner}
        waiting: deque[tuple[float, int, bytes]] = (
            deque()
        )  # one delay for all, so the first in is the first due
        while True:
            left = None if not waiting else max(0.0, waiting[0][0] - time.monotonic())
            ready, _, _ = select.select([self._stop, inner, outer], [], [], left)
            if self._stop in ready:
                return
            now = time.monotonic()
            for end in ready:
                waiting.append((now + self._seconds, other[end], os.read(end, 65536)))
            while waiting and waiting[0][0] <= now:
                _, end, frame = waiting.popleft()
                try:
                    os.write(end, frame)
                except OSError:
                    pass  # the other end is down: a cable says nothing


def _tap(name: str) -> int:
    """The descriptor of a new TAP device in this thread's namespace."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return end
