"""The udp backend: inner packets as payload of UDP port 8285, carried by the Rust data plane.

A packet's way: container → docker0 → routing → flannel0 (TUN) → data plane: whose subnet is the destination? →
UDP to that host's public IP → its data plane: does the sender own the inner source, is the destination ours? →
flannel0 → routing → docker0 → container. Device, address and route are as flannel's (reference: flannel 0.28.9
backend/udp, and 0.7.1 for its dialect, whose device has the whole network's prefix).

Beside it, where it can be had, packets take a path in the kernel (kernel_path.py).

Only this module and kernel_path import `flanctl._native`.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from dataclasses import replace
from ipaddress import IPv4Interface
from pathlib import Path
from typing import TYPE_CHECKING

from flanctl.agent.backends import kernel_path
from flanctl.agent.backends.base import ApplyReport, BackendAttributes, Objects, PeerTraffic
from flanctl.agent.backends.kernel_path import KernelSide
from flanctl.agent.kernel import tun
from flanctl.agent.kernel.links import Device, ensure_device, open_device, refuse_foreign
from flanctl.agent.kernel.routes import Routes, device_route
from flanctl.errors import Conflict, FlanctlError, NotFound, NotPermitted
from flanctl.model.dialect import Dialect

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from ipaddress import IPv4Address, IPv4Network

    from flanctl._native import DataPlane
    from flanctl.agent.kernel.door import Kernel
    from flanctl.agent.kernel.model import Link
    from flanctl.agent.underlay import Underlay
    from flanctl.model.network_config import NetworkConfig
    from flanctl.model.peers import Peer

DEVICE = "flannel0"
ENCAP_OVERHEAD = 28
"""Bytes: 20 of outer IPv4 (RFC 791, no options) and 8 of UDP (RFC 768)."""
LEAST_MTU = 68
"""Bytes: what every link with IPv4 must carry in one piece (RFC 791, 3.2). Linux has no IPv4 on a device with less."""


class UdpBackend:
    """TUN, socket and data plane of one agent. See backends/base.py for what each call promises."""

    device = DEVICE

    def __init__(
        self,
        kernel: Kernel,
        config: NetworkConfig,
        underlay: Underlay,
        *,
        peer_check: str = "strict",
        data_path: str = "tun",
        offloads: str = "all",
    ) -> None:
        """`data_path`: `tc`, in the kernel or not at all; `auto`, there if it can be; `tun`, in user space. With
        `tun-plain` the TUN has no virtio headers and nothing is done in bulk: what a 3.10 kernel can run. `offloads` as
        of `flanctl._native.DataPlane`.
        """
        self._kernel = kernel
        self._config = config
        self._underlay = underlay
        self._peer_check = peer_check
        self._plain = data_path == "tun-plain"
        self._offloads = "none" if self._plain else offloads
        self._routes = Routes(kernel)
        self._socket: socket.socket | None = None
        self._plane: DataPlane | None = None
        self._device: Device | None = None
        self._index = 0
        """The device's at the time we opened it: a device of that name with another index is not the one we hold."""
        self._subnet: IPv4Network | None = None
        self._carried: Sequence[Peer] | None = None
        """The peers the data plane has: the same object is not told again."""
        self._rows: dict[int, tuple[Peer, tuple[str, int, str]]] = {}
        """The data plane's words for each of them, by identity: to print thousands anew takes 10 ms."""
        self._found: tuple[Objects, ...] = ()
        """Device and routes as the last look left them; none where something was missing."""
        self._stopped = threading.Event()
        self._wanted = data_path
        self._side: KernelSide | None = None
        if data_path in {"auto", "tc"}:
            self._side = KernelSide(
                kernel, config, underlay, device=DEVICE, mtu=self.mtu, peer_check=peer_check
            )
        self._flanctl: frozenset[IPv4Address] | None = None
        self._lease_ends: float | None = 0.0
        self._said = ""

    @property
    def data_path(self) -> str:
        return "kernel" if self._side is not None and self._side.attached else "userspace"

    @property
    def data_path_why(self) -> str:
        if self._side is None:
            return f"--data-path {self._wanted}"
        return self._side.why

    @property
    def mtu(self) -> int:
        """Bytes: the underlay's less the outer headers."""
        return self._underlay.mtu - ENCAP_OVERHEAD

    def check(self) -> None:
        """Raises Conflict for a foreign flannel0 or a taken port, NotPermitted, or FlanctlError without TUN."""
        if self.mtu < LEAST_MTU:
            raise FlanctlError(
                f"the underlay's MTU of {self._underlay.mtu} leaves {self.mtu} bytes for inner packets, "
                f"fewer than {LEAST_MTU}"
            )
        refuse_foreign(self._kernel, DEVICE)
        if not os.access(tun.DEVICE, os.R_OK | os.W_OK):
            missing = not Path(tun.DEVICE).exists()
            if missing:
                raise FlanctlError(
                    f"no {tun.DEVICE}: this kernel has no TUN, or the container was not given it",
                    hint="modprobe tun; in a container, pass --device /dev/net/tun",
                    id="no-tun",
                )
            raise NotPermitted(f"no right to open {tun.DEVICE}", hint="run as root")
        if self._socket is None:
            self._socket = _bind(self._underlay.address, self._config.udp_port)

    def prepare(self) -> BackendAttributes:
        """flannel's udp leases carry no backend type and no data."""
        return BackendAttributes()

    def start(self, subnet: IPv4Network) -> None:
        self._subnet = subnet
        base = subnet.network_address
        prefix = self._config.network.prefixlen if self._config.dialect is Dialect.V0_7 else 32
        self._device = Device(DEVICE, mtu=self.mtu, address=IPv4Interface(f"{base}/{prefix}"))
        self._open()

    def told(self, *, lease_ends: float | None, flanctl: frozenset[IPv4Address] | None) -> None:
        self._lease_ends, self._flanctl = lease_ends, flanctl

    def _open(self) -> None:
        """Device, then data plane: the TUN's descriptor is only ours to hand over."""
        from flanctl._native import DataPlane

        device, subnet = self._device, self._subnet
        if device is None or subnet is None or self._socket is None:
            raise RuntimeError("start follows check")
        descriptor = open_device(self._kernel, DEVICE, vnet_hdr=not self._plain)
        try:
            ensure_device(self._kernel, device)
            link = self._kernel.link(DEVICE)
            self._index = 0 if link is None else link.index
            plane = DataPlane(
                descriptor,
                self._socket.fileno(),
                mtu=self.mtu,
                gateway=f"{subnet.network_address + 1}/{subnet.prefixlen}",
                port=self._config.udp_port,
                peer_check=self._peer_check,
                offloads=self._offloads,
            )
        finally:
            os.close(descriptor)
        plane.start()
        self._plane, self._carried = plane, None

    def apply(self, peers: Sequence[Peer], *, look: bool = True) -> ApplyReport:
        repaired: list[str] = []
        if self._plane is None or self._device is None:
            raise RuntimeError("apply follows start")
        why = self._plane.failure()
        if not look and why is None and self._found:
            self._tell(self._plane, peers)
            if self._side is not None:
                self._side.follow(peers, self._words(), flanctl=self._flanctl, until=self._lease_ends)
            return ApplyReport(len(peers), objects=self._found)
        self._found = ()
        link = self._kernel.link(DEVICE)
        if link is None or link.index != self._index:
            # Deleted under us: its descriptor died with it. If somebody made another in its place, opening refuses.
            why = f"{DEVICE} was gone, made anew"
        elif why is not None:
            why = f"data plane had ended ({why}), started anew"
        if why is not None:
            self._plane.stop(1.0)
            self._open()
            repaired.append(why)
            link = None
        try:
            mended = ensure_device(self._kernel, self._device, link)
            repaired += mended
            if mended or link is None:
                link = self._kernel.link(DEVICE)
        except NotFound:
            link = None
        device = Objects("link", 1, missing=int(link is None), repaired=len(repaired))
        if link is None:
            return ApplyReport(len(peers), tuple(repaired), (f"{DEVICE} is gone again",), (device,))
        wanted = [] if self._config.dialect is Dialect.V0_7 else [device_route(link, self._config.network)]
        report = self._routes.apply(wanted)
        self._tell(self._plane, peers)
        routes = Objects("route", len(wanted), missing=report.missing, repaired=len(report.repaired))
        # After the user-space table, so that what the kernel passes up falls on one that knows.
        in_kernel = self._apply_side(peers, link)
        if not report.missing:
            self._found = (replace(device, repaired=0), replace(routes, repaired=0))
        return ApplyReport(
            len(peers),
            (*repaired, *report.repaired, *in_kernel),
            report.failed,
            objects=(device, routes),
            notes=self._notes(),
        )

    def _tell(self, plane: DataPlane, peers: Sequence[Peer]) -> None:
        if peers is not self._carried:
            before, self._rows = self._rows, {}
            for peer in peers:
                self._rows[id(peer)] = before.get(id(peer)) or (peer, _row(peer))
            plane.replace_routes(list(self._words()))
            self._carried = peers

    def _words(self) -> Iterator[tuple[str, int, str]]:
        return (row for _, row in self._rows.values())

    def _apply_side(self, peers: Sequence[Peer], link: Link) -> tuple[str, ...]:
        """The kernel path. Raises FlanctlError where it is wanted at any price and cannot be had from the start."""
        side, subnet = self._side, self._subnet
        if side is None or subnet is None:
            if not self._said and link.running:
                # What an agent before us attached carries packets until now, when this one has peers to send to and its
                # device's queue is open.
                kernel_path.remove(self._kernel)
                self._said = self.data_path_why
            return ()
        repaired = side.apply(
            subnet, peers, self._words(), flanctl=self._flanctl, until=self._lease_ends, device=link
        )
        if self._wanted == "tc" and not side.attached and not self._said:
            raise FlanctlError(
                f"--data-path tc: packets cannot be carried in the kernel: {side.why}",
                hint="--data-path auto takes user space where the kernel cannot",
                id="no-kernel-path",
            )
        return repaired

    def _notes(self) -> tuple[str, ...]:
        """A sentence about the path when it is another than it was, or for another reason."""
        if self._side is None:
            return ()
        why = self.data_path_why
        if self._side.attached:
            sentence = "packets are carried in the kernel" + (f"; {why}" if why else "")
        else:
            sentence = f"packets are carried in user space, not in the kernel: {why}"
        if sentence == self._said:
            return ()
        self._said = sentence
        return (sentence,)

    def counters(self) -> Mapping[str, int]:
        """Of both paths together; what the kernel's had of it is `kernel_…` besides."""
        total = {} if self._plane is None else dict(self._plane.counters())
        if self._side is not None:
            for name, count in self._side.counters().items():
                total[f"kernel_{name}"] = count
                if not name.startswith(("pass_", "stack_")):
                    total[name] = total.get(name, 0) + count
        return total

    def peers(self) -> Mapping[str, PeerTraffic]:
        found = {} if self._plane is None else self._plane.peers()
        total = {peer: PeerTraffic(*counts) for peer, counts in found.items()}
        if self._side is not None:
            for peer, counts in self._side.peers().items():
                kernels = PeerTraffic(*counts)
                if any(kernels[:-1]):
                    total[peer] = total[peer].plus(kernels) if peer in total else kernels
        return total

    def offloads(self) -> Mapping[str, tuple[bool, str]]:
        return {} if self._plane is None else self._plane.offloads()

    def lost(self) -> None:
        if self._side is not None:
            self._side.lost()

    def wait(self, seconds: float) -> str | None:
        plane = self._plane
        if plane is None:
            self._stopped.wait(seconds)
            return None
        return plane.failure() if plane.wait(seconds) else None

    def stop(self) -> None:
        self._stopped.set()
        if self._side is not None:
            self._side.stopping()
        if self._plane is not None:
            self._plane.stop(2.0)
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _row(peer: Peer) -> tuple[str, int, str]:
    return str(peer.subnet.network_address), peer.subnet.prefixlen, str(peer.public_ip)


def _bind(address: IPv4Address, port: int) -> socket.socket:
    """The underlay's socket. Bound to one address, as flanneld's, because peers check where packets come from."""
    channel = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        channel.bind((str(address), port))
    except OSError as error:
        channel.close()
        where = f"UDP {address}:{port}"
        if error.errno == errno.EADDRINUSE:
            who = port_holders(port)
            raise Conflict(
                f"{where} is in use" + (f" by {', '.join(who)}" if who else ""),
                hint="stop the other one first",
                id="port-in-use",
            ) from None
        if error.errno in {errno.EACCES, errno.EPERM}:
            raise NotPermitted(f"may not listen on {where}: {error.strerror}", hint="run as root") from None
        raise FlanctlError(f"cannot listen on {where}: {error.strerror}") from None
    return channel


def port_holders(port: int, *, proc: Path = Path("/proc")) -> tuple[str, ...]:
    """Processes that hold a UDP/IPv4 port in this network namespace: `flanneld (pid 1187)`. Root sees them all."""
    inodes = set()
    try:
        lines = (proc / "thread-self/net/udp").read_text().splitlines()[1:]
    except OSError:
        return ()
    for line in lines:
        fields = line.split()
        if int(fields[1].rpartition(":")[2], 16) == port:
            inodes.add(f"socket:[{fields[9]}]")
    found = []
    for process in proc.iterdir():
        if not process.name.isdigit():
            continue
        try:
            if any(os.readlink(fd) in inodes for fd in (process / "fd").iterdir()):
                found.append(f"{(process / 'comm').read_text().strip()} (pid {process.name})")
        except OSError:
            continue  # ended meanwhile, or not ours to see
    return tuple(found)
