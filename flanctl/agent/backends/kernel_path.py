"""The udp backend's path in the kernel: whether it can be had here, attaching it, and following what changes.

        flannel0 egress ── flanctl_enc ──▶ uplink          maps: /sys/fs/bpf/flanctl/<namespace>-<network>/
        uplink ingress  ── flanctl_dec ──▶ flannel0        filters: kernel/tc.py
                              └──▶ flannel0-rx ── flanctl_rx ──▶ flannel0

flannel0-rx is a VXLAN-GPE device of the kernel's, through which TCP's data for containers goes (by_stack in
flannel.bpf.c says why). Where it cannot be had, flanctl_dec does without.

The programs (native/bpf) give whatever they do not want to the user-space path, which always runs; so this one may come
and go under traffic. It comes when nothing speaks against it and a probe has shown that this kernel does what we think
it does; any doubt, and it goes, with the reason. `flanctl cleanup` removes it.

Order (measured without loss): maps, the device, decapsulation on every uplink, encapsulation; and back the other way round. A
restart finds the filters there, loads its own programs onto the pinned maps and swaps them in place.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from flanctl.agent.kernel import bypassed, vxlan
from flanctl.agent.kernel.links import ALIAS
from flanctl.agent.kernel.tc import PREFERENCE, Filters, program_id
from flanctl.errors import Conflict, FlanctlError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from ipaddress import IPv4Network

    from flanctl._native import KernelPath
    from flanctl.agent.kernel.door import Kernel
    from flanctl.agent.kernel.model import Link
    from flanctl.agent.underlay import Underlay
    from flanctl.model.network_config import NetworkConfig
    from flanctl.model.peers import Peer

BPFFS = Path("/sys/fs/bpf")
ENCAP, DECAP, RECEIVE = "flanctl_enc", "flanctl_dec", "flanctl_rx"
UNRETURNED = 3
"""Datagrams given to the stack of which none came back that mean that something there takes them. A connection tries as often."""
RX_PORTS = range(58285, 58301)
"""UDP ports that the device for RECEIVE may take, the first that is free. Nothing is sent to it from outside."""
RX = "-rx"
MOST_UPLINKS = 8
FIRST_SAMPLE, SAMPLE = 64, 8
FOREVER = (1 << 64) - 1
GRACE = 120
"""Seconds for which the path goes on when its agent was stopped: time for a restart, and for an upgrade. Then nobody follows the
leases any more, and flanneld may be what runs here next."""
FIRST_LOOK, LOOK_AGAIN = 3.0, 300.0
"""Seconds until the first look at the firewall's rules, and between two: it takes a while, and a start has no time for it."""
TRY_AGAIN, TRY_AGAIN_AT_MOST = 4.0, 300.0
"""Seconds until it is tried again after a kernel refused it, twice as many each time: at boot there may be no route yet."""


class KernelSettings(TypedDict):
    """What the TC programs compare packets with."""

    valid_until: int
    """Nanoseconds of CLOCK_BOOTTIME after which everything goes to user space: the end of our lease."""
    tun: int
    """Interface index of the TUN."""
    local: str
    """The underlay address that peers send to."""
    port: int
    mtu: int
    """The TUN's."""
    peer_check: str
    network: str
    own: str
    uplinks: list[int]
    """Interface indexes that packets may leave by, MOST_UPLINKS at most."""
    rx_port: int
    """UDP port of the VXLAN-GPE device that receives for us; 0: there is none."""


class NoKernelPath(Exception):
    """Why packets take the user-space path; a sentence's end."""


class KernelSide:
    """One agent's. Called from the daemon's one thread, `counters` from any."""

    def __init__(
        self,
        kernel: Kernel,
        config: NetworkConfig,
        underlay: Underlay,
        *,
        device: str,
        mtu: int,
        peer_check: str,
        bpffs: Path = BPFFS,
    ) -> None:
        self._kernel = kernel
        self._filters = Filters(kernel)
        self._config = config
        self._underlay = underlay
        self._device = device
        self._mtu = mtu
        self._peer_check = peer_check
        self._bpffs = bpffs
        self._path: KernelPath | None = None
        self._settings: KernelSettings | None = None
        """What `_path` was told last."""
        self._ids = (0, 0, 0)
        self._carried: tuple[Sequence[Peer], Collection[IPv4Address]] | None = None
        """Peers, and hosts that run flanctl, as the maps have them: the same objects are not told again."""
        self._remembered: frozenset[IPv4Address] = frozenset()
        """Hosts that an agent before us knew to run flanctl."""
        self._refused = ""
        """Why it could not be loaded when that was tried last."""
        self._try_at = 0.0
        self._try_again = TRY_AGAIN
        self._uplinks: tuple[Link, ...] = ()
        self._sampled = 0
        self._clean = False
        """Nothing of ours is attached, by us or by an agent before us."""
        self._look_at = time.monotonic() + FIRST_LOOK
        self._inert = ""
        self._no_receiver = ""
        self._returned: tuple[int, int] | None = None
        """Packets that had come out of the receiver when that number last changed, and datagrams given to the stack until then."""
        self._given = 0
        """Datagrams given to the stack until the last look."""
        self._swallowed = False
        self.attached = False
        self.why = "it has not been tried yet"
        """Why it is not attached; while it is, what an operator should know about it, or nothing."""

    @property
    def pins(self) -> Path:
        return pins_of(self._config.network, self._bpffs)

    def apply(
        self,
        own: IPv4Network,
        peers: Sequence[Peer],
        rows: Iterable[tuple[str, int, str]],
        *,
        flanctl: Collection[IPv4Address] | None,
        until: float | None,
        device: Link,
    ) -> tuple[str, ...]:
        """Have it as it should be: sentences for what had to be repaired. Never raises: without it packets flow too.

        `rows` are the peers in the data plane's words. `flanctl` are the hosts known to run it; None: nobody knows yet, so
        they are those that were known last.
        `until` is the end of our lease, in seconds since boot; None for a reservation.
        """
        try:
            self._refuse()
            uplinks = self._find_uplinks(peers)
            settings: KernelSettings = {
                "valid_until": _boot_nanoseconds(until),
                "tun": device.index,
                "local": str(self._underlay.address),
                "port": self._config.udp_port,
                "mtu": self._mtu,
                "peer_check": self._peer_check,
                "network": str(self._config.network),
                "own": str(own),
                "uplinks": [link.index for link in uplinks],
                "rx_port": 0,
            }
            path = self._path or self._load(settings)
            self._tell(path, peers, rows, flanctl)
            settings["rx_port"] = self._have_receiver(path)
            path.configure(settings)
            self._settings = settings
            return self._attach(path, uplinks, device)
        except NoKernelPath as reason:
            self._withdraw(str(reason))
        except (FlanctlError, RuntimeError) as error:
            self._withdraw(str(error))
        return ()

    def follow(
        self,
        peers: Sequence[Peer],
        rows: Iterable[tuple[str, int, str]],
        *,
        flanctl: Collection[IPv4Address] | None,
        until: float | None,
    ) -> None:
        """As `apply`, where nothing but these has changed. Never raises."""
        if self._path is None or self._settings is None or not self.attached:
            return
        try:
            self._tell(self._path, peers, rows, flanctl)
            self._settings = {**self._settings, "valid_until": _boot_nanoseconds(until)}
            self._path.configure(self._settings)
        except RuntimeError as error:
            self._withdraw(str(error))

    def _tell(
        self,
        path: KernelPath,
        peers: Sequence[Peer],
        rows: Iterable[tuple[str, int, str]],
        flanctl: Collection[IPv4Address] | None,
    ) -> None:
        ours = self._remembered if flanctl is None else flanctl
        if self._carried is not None and self._carried[0] is peers and self._carried[1] is ours:
            return
        self._carried = None
        path.replace_peers([(*row, peer.public_ip in ours) for peer, row in zip(peers, rows, strict=True)])
        self._carried = peers, ours

    def lost(self) -> None:
        """Our subnet is another host's. Left alone the programs would carry it until the lease we had would have ended."""
        self._withdraw("our subnet is another host's")

    def stopping(self) -> None:
        """The agent was asked to end: the path has GRACE left. Never raises."""
        if self._path is None or self._settings is None or not self.attached:
            return
        end = time.clock_gettime_ns(time.CLOCK_BOOTTIME) + GRACE * 10**9
        try:
            self._path.configure({**self._settings, "valid_until": min(self._settings["valid_until"], end)})
        except RuntimeError:
            return  # it goes on until the lease ends, as after a kill

    def counters(self) -> Mapping[str, int]:
        path = self._path
        try:
            return {} if path is None else path.counters()
        except RuntimeError:
            return {}  # the maps are ours as long as we live: this is a kernel that does not let us look any more

    def peers(self) -> Mapping[str, tuple[int, int, int, int, int, float | None]]:
        """Traffic by public IP as `PeerTraffic` has it, of this path alone."""
        path = self._path
        try:
            return {} if path is None else path.peers()
        except RuntimeError:
            return {}

    # ---- may it be ------------------------------------------------------------------------------------------------

    def _refuse(self) -> None:
        """Raise NoKernelPath for what can be seen without trying."""
        now = time.monotonic()
        if now < self._try_at:
            raise NoKernelPath(self._refused)
        if now >= self._look_at:
            self._look_at = now + LOOK_AGAIN
            rules = bypassed.rules_on_port(self._config.udp_port)
            self._inert = "; ".join(f'"{rule}"' for rule in rules)
        if bypassed.has_ipsec_policies():
            raise NoKernelPath("this host has IPsec policies, which packets in the kernel path would pass by")

    def _find_uplinks(self, peers: Sequence[Peer]) -> tuple[Link, ...]:
        """The links that may carry our datagrams: the underlay, and those that lead to a peer.

        A few peers at each look, others at the next; packets to one whose link is not known yet take the other path.
        """
        main = self._main_link()
        if not main.ethernet and not main.loopback:
            raise NoKernelPath(
                f"{main.name} is no Ethernet link, and others are not carried in the kernel yet"
            )
        found = {main.index: main} if main.ethernet else {}
        for before in self._uplinks:
            link = self._kernel.link(before.name)
            if link is not None and link.index == before.index and link.ethernet:
                found[link.index] = link
        look = SAMPLE if self._uplinks else FIRST_SAMPLE
        sample = [peers[(self._sampled + n) % len(peers)] for n in range(min(look, len(peers)))]
        self._sampled += look
        for peer in sample:
            path = self._kernel.route_to(peer.public_ip)
            if path is None or path.link in found:
                continue
            link = self._kernel.link(_name(path.link))
            if link is not None and link.ethernet and link.name != self._device:
                found[link.index] = link
        if not found:
            raise NoKernelPath("no Ethernet link leads to a peer")
        return tuple(found.values())[:MOST_UPLINKS]

    def _main_link(self) -> Link:
        """The one that has our address, whatever it is called by now."""
        address = self._underlay.address
        link = self._kernel.link(self._underlay.link.name)
        if link is None or all(own.ip != address for own in link.addresses):
            having = (
                link for link in self._kernel.links() if any(own.ip == address for own in link.addresses)
            )
            link = next(having, None)
        if link is None:
            raise NoKernelPath(f"no interface has the address {address}")
        return link

    # ---- getting it -----------------------------------------------------------------------------------------------

    def _load(self, settings: KernelSettings) -> KernelPath:
        """Look at the kernel, then load the programs."""
        from flanctl._native import KernelPath

        try:
            self._have_bpffs()
            KernelPath.probe(settings, str(self._somebody(settings)))
            path = KernelPath(
                str(self.pins),
                network=str(self._config.network),
                subnet_len=self._config.subnet_len,
            )
        except (NoKernelPath, RuntimeError) as error:
            self._refused = str(error)
            if "Operation not permitted" in self._refused:
                self._refused += "; it takes CAP_BPF and CAP_PERFMON beside CAP_NET_ADMIN"
            self._try_at = time.monotonic() + self._try_again
            self._try_again = min(2 * self._try_again, TRY_AGAIN_AT_MOST)
            raise NoKernelPath(self._refused) from None
        encap, decap, receive = path.programs()
        self._remembered = frozenset(map(IPv4Address, path.direct_peers()))
        self._path, self._ids = path, (program_id(encap), program_id(decap), program_id(receive))
        return path

    def _have_receiver(self, path: KernelPath) -> int:
        """The VXLAN-GPE device with RECEIVE on it: its port. 0 where it cannot be had; `_no_receiver` says why."""
        name = receiver_of(self._device)
        self._watch_receiver(path.counters())
        if self._swallowed:
            self._no_receiver = f"what was given to the stack did not come out of {name}; UDP port {self._config.udp_port} must pass INPUT"
            return 0
        try:
            link = self._kernel.link(name)
            if link is None:
                link = self._make_receiver(name)
            port = vxlan.gpe_port(self._kernel, name)
            # An agent may have been killed before its mark was on it.
            if port is None or (link.alias != ALIAS and (link.alias or link.up)):
                raise Conflict(f"{name} exists and is not ours")
            if self._filters.ours(link.index, "ingress", RECEIVE) != self._ids[2]:
                self._filters.attach(link.index, "ingress", path.programs()[2], RECEIVE)
            if not link.up or link.alias != ALIAS:
                self._kernel.set_link(name, up=True, alias=ALIAS)
        except FlanctlError as error:
            self._no_receiver = str(error)
            return 0
        self._no_receiver = ""
        return port

    def _watch_receiver(self, counters: Mapping[str, int]) -> None:
        """Something in the stack may take what flanctl_dec gives it: a rule on INPUT, a hook that takes the socket away. Then ping
        works and TCP does not, so that way is left for good.
        """
        if self._returned is None or counters["stack_returned"] != self._returned[0]:
            self._returned = counters["stack_returned"], counters["stack_given"]
        elif self._given - self._returned[1] >= UNRETURNED:
            self._swallowed = True  # by then they were not on their way any more
        self._given = counters["stack_given"]

    def _make_receiver(self, name: str) -> Link:
        """The device, up, for only then is its port taken. Raises FlanctlError."""
        for port in RX_PORTS:
            vxlan.make_gpe(self._kernel, name, port)
            self._kernel.silence_ipv6(name)
            try:
                self._kernel.set_link(name, up=True, alias=ALIAS)
            except Conflict:
                self._kernel.delete_link(name)  # somebody has the port
                continue
            link = self._kernel.link(name)
            if link is not None:
                return link
        raise Conflict(f"no UDP port of {RX_PORTS[0]} to {RX_PORTS[-1]} is free for {name}")

    def _have_bpffs(self) -> None:
        """Where maps are pinned. Mounted where it is not, as iproute2 and bpftool do."""
        if not self._bpffs.is_dir():
            raise NoKernelPath(f"there is no {self._bpffs}: this kernel has no BPF file system")
        if not _is_bpffs(self._bpffs):
            command = ["mount", "-t", "bpf", "bpf", str(self._bpffs)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
                words = done.stderr.strip().splitlines()[-1:]
            except OSError as error:
                words = [str(error)]
            if not _is_bpffs(self._bpffs):
                raise NoKernelPath(
                    f"no BPF file system at {self._bpffs}, and mounting it failed: {' '.join(words)}"
                )
        if not os.access(self._bpffs, os.W_OK):
            raise NoKernelPath(f"the BPF file system at {self._bpffs} is not writable")

    def _somebody(self, settings: KernelSettings) -> IPv4Address:
        """An address beyond the underlay, for the probe's packets, which go nowhere."""
        for link in self._kernel.links():
            if link.index in settings["uplinks"]:
                for address in link.addresses:
                    for host in _some_hosts(address.network):
                        if host != self._underlay.address:
                            return host
        default = self._kernel.default_route()
        if default is None or default.gateway is None:
            raise NoKernelPath("there is no route to try it with")
        return default.gateway

    def _attach(self, path: KernelPath, uplinks: tuple[Link, ...], device: Link) -> tuple[str, ...]:
        encap, decap, _ = path.programs()
        repaired, self._clean = [], False
        for link in uplinks:
            if self._filters.ours(link.index, "ingress", DECAP) != self._ids[1]:
                self._filters.attach(link.index, "ingress", decap, DECAP)
                repaired.append(f"{DECAP} was not on {link.name}, attached")
        for link in self._uplinks:
            if link.index not in {one.index for one in uplinks}:
                self._filters.detach(link.index, "ingress", DECAP)
        self._uplinks = uplinks
        if self._filters.ours(device.index, "egress", ENCAP) != self._ids[0]:
            self._filters.attach(device.index, "egress", encap, ENCAP)
            repaired.append(f"{ENCAP} was not on {device.name}, attached")
        path.pin()
        if not self.attached:
            self.attached, repaired = True, []
        known = []
        if self._inert:
            known.append(
                f"firewall rules on UDP port {self._config.udp_port} do not see all that the kernel path carries: "
                f"{self._inert}"
            )
        if self._no_receiver:
            known.append(f"TCP to containers is slower than it could be: {self._no_receiver}")
        self.why = "; ".join(known)
        return tuple(repaired)

    def _withdraw(self, why: str) -> None:
        """Packets go to user space from now on; the reason stands in `why`."""
        self.why, self.attached = why, False
        if self._clean:
            return
        try:
            if self._path is not None:
                self._path.disable()
            detach(self._kernel)
            self._clean = True
        except (FlanctlError, RuntimeError):
            return  # tried again at the next look; disabled, or past the lease's end, the programs pass everything


def _boot_nanoseconds(until: float | None) -> int:
    return FOREVER if until is None else max(0, int(until * 1e9))


def pins_of(network: IPv4Network, bpffs: Path = BPFFS) -> Path:
    """Where a network's maps are pinned: by network namespace too, for those share the file system.

    The file system takes no dots in names (kernel/bpf/inode.c, bpf_lookup).
    """
    return bpffs / "flanctl" / f"{_namespace()}-{str(network).replace('.', '_').replace('/', '-')}"


def receiver_of(device: str) -> str:
    """Name of the VXLAN-GPE device beside ours; 15 characters at most, as the kernel takes (IFNAMSIZ)."""
    return device[: 15 - len(RX)] + RX


def attached(kernel: Kernel) -> list[tuple[str, str]]:
    """Where our programs hang, by link and direction: encapsulation first, in the order in which they are to go."""
    filters, links = Filters(kernel), kernel.links()
    places = (("egress", ENCAP), ("ingress", DECAP))
    return [
        (link.name, direction)
        for direction, name in places
        for link in links
        if any(
            found.name == name and found.preference == PREFERENCE
            for found in filters.list(link.index, direction)
        )
    ]


def detach(kernel: Kernel, *, tidy: bool = False) -> None:
    """Take our programs off every link. None there is fine. Raises FlanctlError where the kernel refuses.

    `tidy`: and a clsact that holds nothing any more. Adding and removing one stops the link's queue for a moment, in which
    packets are lost (measured; net/sched/sch_api.c, qdisc_graft), so where packets flow it stays.
    """
    filters = Filters(kernel)
    by_name = {link.name: link.index for link in kernel.links()}
    for name, direction in attached(kernel):
        filters.detach(by_name[name], direction, ENCAP if direction == "egress" else DECAP)
        if tidy:
            filters.tidy(by_name[name])
    # After decapsulation: what is on its way to it is lost.
    for link in kernel.links():
        if link.alias == ALIAS and link.kind == "vxlan" and link.name.endswith(RX):
            kernel.delete_link(link.name)


def pinned(bpffs: Path = BPFFS) -> list[Path]:
    """Directories with maps that agents of this network namespace have pinned, whatever their networks."""
    try:
        return sorted((bpffs / "flanctl").glob(f"{_namespace()}-*"))
    except OSError:
        return []


def unpin(pins: Path) -> None:
    """Remove a directory of pinned maps; gone already is fine. Raises FlanctlError."""
    try:
        if pins.is_dir():
            for pin in pins.iterdir():
                pin.unlink()
            pins.rmdir()
    except OSError as error:
        raise FlanctlError(f"cannot remove {pins}: {error.strerror}") from None


def remove(kernel: Kernel) -> None:
    """Programs, then pins, so that no agent finds pins without programs: where the path is not wanted any more."""
    detach(kernel)
    for pins in pinned():
        unpin(pins)


def _namespace() -> int:
    return Path("/proc/thread-self/ns/net").stat().st_ino


def _is_bpffs(path: Path) -> bool:
    """By the mount table: statfs(2) is not in Python. By device, for a mount may be hidden under a later one."""
    try:
        device = path.stat().st_dev
        mounts = Path("/proc/thread-self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return False
    wanted = f"{os.major(device)}:{os.minor(device)}"
    return any(line.split()[2] == wanted and line.partition(" - ")[2].split()[0] == "bpf" for line in mounts)


def _name(link: int) -> str:
    try:
        return socket.if_indextoname(link)
    except OSError:
        return ""


def _some_hosts(network: IPv4Network) -> Iterator[IPv4Address]:
    """The first two hosts of a network, if it has room for others than its owner."""
    if network.prefixlen < 31:
        yield network.network_address + 1
        yield network.network_address + 2
