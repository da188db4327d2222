"""subnet.env: what the agent tells this host about its subnet (flannel.md 4.1).

FLANNEL_NETWORK=172.17.0.0/16
FLANNEL_SUBNET=172.17.41.1/24
FLANNEL_MTU=1472
FLANNEL_IPMASQ=false
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Interface, IPv4Network, NetmaskValueError
from typing import TYPE_CHECKING

from flanctl.errors import Invalid
from flanctl.model.docker_options import read_variables

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class SubnetFile:
    """The four lines flannel writes."""

    network: IPv4Network
    interface: IPv4Interface
    """The subnet's first address, which docker0 gets, with the subnet's length."""
    mtu: int
    """Bytes an inner packet may have."""
    ip_masq: bool
    """Whether the agent masquerades (docker then must not)."""

    @classmethod
    def for_lease(cls, network: IPv4Network, subnet: IPv4Network, mtu: int, ip_masq: bool) -> SubnetFile:
        """What to write for a host that holds `subnet`."""
        return cls(network, IPv4Interface((subnet.network_address + 1, subnet.prefixlen)), mtu, ip_masq)

    @classmethod
    def parse(cls, text: str | bytes, *, name: str = "subnet.env") -> SubnetFile:
        """Read a subnet.env with all four variables; others (IPv6) are left alone. Raises Invalid."""
        variables = read_variables(text, name=name)
        network = _interface(variables, "FLANNEL_NETWORK", name)
        interface = _interface(variables, "FLANNEL_SUBNET", name)
        if network.ip != network.network.network_address:
            raise Invalid(f"{name}: FLANNEL_NETWORK {network} has host bits set")
        if not interface.network.subnet_of(network.network):
            raise Invalid(f"{name}: FLANNEL_SUBNET {interface} is outside FLANNEL_NETWORK {network}")
        mtu = _get(variables, "FLANNEL_MTU", name)
        if not (mtu.isascii() and mtu.isdigit() and len(mtu) <= 5 and 68 <= int(mtu) <= 65535):
            raise Invalid(f"{name}: FLANNEL_MTU {mtu[:40]!a} is not a number from 68 to 65535")
        ip_masq = _get(variables, "FLANNEL_IPMASQ", name)
        if ip_masq not in ("true", "false"):
            raise Invalid(f"{name}: FLANNEL_IPMASQ {ip_masq[:40]!a} is neither true nor false")
        return cls(network.network, interface, int(mtu), ip_masq == "true")

    def format(self) -> str:
        """The file's text, byte for byte flannel's."""
        return (
            f"FLANNEL_NETWORK={self.network}\n"
            f"FLANNEL_SUBNET={self.interface}\n"
            f"FLANNEL_MTU={self.mtu}\n"
            f"FLANNEL_IPMASQ={'true' if self.ip_masq else 'false'}\n"
        )

    @property
    def subnet(self) -> IPv4Network:
        """The subnet this host held."""
        return self.interface.network


def _get(variables: Mapping[str, str], key: str, name: str) -> str:
    if not variables.get(key):
        raise Invalid(f"{name}: {key} is missing")
    return variables[key]


def _interface(variables: Mapping[str, str], key: str, name: str) -> IPv4Interface:
    text = _get(variables, key, name)
    address, slash, length = text.partition("/")
    try:
        if slash and length.isascii() and length.isdigit():
            return IPv4Interface((IPv4Address(address), int(length[:4])))
    except (AddressValueError, NetmaskValueError):
        pass
    raise Invalid(f"{name}: {key} {text[:40]!a} is not like 172.17.41.1/24")
