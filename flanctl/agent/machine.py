"""The host as the daemon uses it: interface, backend, rules, link events, chosen by what the config wants."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flanctl.agent.kernel.docker_accept import DockerAccept
from flanctl.agent.kernel.rules import IptablesRules
from flanctl.agent.kernel.ruleset import generation
from flanctl.agent.underlay import choose_underlay, overlaps
from flanctl.errors import FlanctlError, Invalid, NotPermitted

if TYPE_CHECKING:
    from collections.abc import Callable
    from ipaddress import IPv4Network

    from flanctl.agent.backends.base import Backend
    from flanctl.agent.kernel.door import Kernel
    from flanctl.agent.underlay import Underlay
    from flanctl.model.network_config import NetworkConfig

CAP_NET_ADMIN = 12
"""include/uapi/linux/capability.h"""


@dataclass(frozen=True, slots=True)
class Choice:
    """What the operator said about interface and data path."""

    iface: tuple[str, ...] = ()
    iface_regex: tuple[str, ...] = ()
    iface_can_reach: str | None = None
    public_ip: str | None = None
    peer_check: str = "strict"
    data_path: str = "tun"
    offloads: str = "all"


@dataclass(frozen=True, slots=True)
class Machine:
    """Made by `look`; changes nothing until the backend starts."""

    kernel: Kernel
    config: NetworkConfig
    underlay: Underlay
    backend: Backend
    warnings: tuple[str, ...]

    def rules(self, subnet: IPv4Network) -> IptablesRules:
        return IptablesRules(self.config.network, subnet)

    def ruleset_generation(self) -> int | None:
        """Another number whenever somebody has changed a firewall rule; None where that cannot be told."""
        return generation()

    def docker_accept(self, subnet: IPv4Network, *, wanted: bool) -> DockerAccept:
        return DockerAccept(self.config.network, subnet, self.backend.device, wanted=wanted)

    def link_watch(self, changed: Callable[[], None]) -> tuple[Callable[[], None], Callable[[], None]]:
        """`run` and `stop` of a worker that calls `changed` whenever our device or the underlay changed."""
        from flanctl.agent.kernel.netlink import LinkMonitor

        monitor = LinkMonitor({"flannel0", self.underlay.link.name})

        def watch() -> None:
            try:
                while not monitor.stopped:
                    if monitor.wait():
                        changed()
            finally:
                monitor.close()

        return watch, monitor.stop

    def underlay_trouble(self) -> str | None:
        """What keeps peers from reaching us at the address they know: a sentence, or None. Never raises."""
        try:
            link = self.kernel.link(self.underlay.link.name)
        except FlanctlError:
            return None
        name, address = self.underlay.link.name, self.underlay.address
        if link is None:
            return f"the interface {name} is gone; restart the agent once it is back"
        if all(own.ip != address for own in link.addresses):
            return f"the address {address} is gone from {name}; restart the agent to use another"
        return None if link.up else f"the interface {name} is down"

    def docker_bridge(self) -> tuple[str, ...] | None:
        """docker0's addresses, `172.17.41.1/24`; None without a docker0, or if the kernel does not say."""
        try:
            link = self.kernel.link("docker0")
        except FlanctlError:
            return None
        return None if link is None else tuple(str(address) for address in link.addresses)

    def close(self) -> None:
        self.kernel.close()


def look(config: NetworkConfig, choice: Choice) -> Machine:
    """Find interface and backend for this config. Raises what keeps an agent from working here; changes nothing."""
    refuse_without_rights()
    if config.backend_type != "udp":
        raise Invalid(
            f'this flanctl cannot carry packets for the backend "{config.backend_type}" yet, only for udp',
            hint="keep flanneld on this host for now",
            id="backend-unsupported",
        )
    from flanctl.agent.backends.udp import DEVICE, UdpBackend
    from flanctl.agent.kernel.netlink import NetlinkKernel

    kernel = NetlinkKernel()
    try:
        underlay = _underlay(kernel, choice)
        warnings = list(overlaps(config.network, kernel, ignore=(DEVICE,)))
        if _forwarding_is_off():
            warnings.append(
                "net.ipv4.ip_forward is 0: containers will not be reached; sysctl -w net.ipv4.ip_forward=1"
            )
        backend = UdpBackend(
            kernel,
            config,
            underlay,
            peer_check=choice.peer_check,
            data_path=choice.data_path,
            offloads=choice.offloads,
        )
    except BaseException:
        kernel.close()
        raise
    return Machine(kernel, config, underlay, backend, tuple(warnings))


def refuse_choice(choice: Choice) -> None:
    """Raises what `look` would for an interface or address that somebody chose and that does not fit this host.

    flanneld looks before it asks etcd, and ends with 1 whatever etcd does (network/manager.go). Without a choice it is
    the default route's interface: a host that boots may get that route later than it starts us, so it is looked for
    when the config is there.
    """
    if not (choice.iface or choice.iface_regex or choice.iface_can_reach or choice.public_ip):
        return
    from flanctl.agent.kernel.netlink import NetlinkKernel

    kernel = NetlinkKernel()
    try:
        _underlay(kernel, choice)
    finally:
        kernel.close()


def _underlay(kernel: Kernel, choice: Choice) -> Underlay:
    return choose_underlay(
        kernel,
        iface=choice.iface,
        iface_regex=choice.iface_regex,
        iface_can_reach=choice.iface_can_reach,
        public_ip=choice.public_ip,
    )


def refuse_without_rights() -> None:
    """Raises NotPermitted without CAP_NET_ADMIN, before anything else is tried."""
    try:
        status = Path("/proc/self/status").read_text()
        effective = int(
            next(line for line in status.splitlines() if line.startswith("CapEff:")).split()[1], 16
        )
    except (OSError, StopIteration, ValueError) as error:
        raise FlanctlError(f"cannot read /proc/self/status: {error}") from None
    if not effective >> CAP_NET_ADMIN & 1:
        raise NotPermitted(
            "the agent needs CAP_NET_ADMIN to make devices, routes and rules",
            hint="run it as root",
            id="no-cap-net-admin",
        )


def _forwarding_is_off() -> bool:
    try:
        return Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() == "0"
    except OSError:
        return False
