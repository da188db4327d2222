"""The subnet as today's Docker setups want to be told it: merged into daemon.json, or as a network of its own.

told = daemon_settings(variables)              # {"bip": "172.17.41.1/24", "ip-masq": True, "mtu": 1472}
merge(b'{"log-driver": "local"}', told)        # the same text with those three in it
network_arguments(variables)                   # for docker network create
"""

from __future__ import annotations

import json
import re
from ipaddress import IPv4Interface, IPv4Network
from typing import TYPE_CHECKING

from flanctl.errors import Conflict, Invalid
from flanctl.model import json_text
from flanctl.model.docker_options import ACCEPT_MARK, flannel_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    Value = str | int | bool

_INDENT = re.compile(r"\n([ \t]*)$")


def daemon_settings(
    variables: Mapping[str, str], *, ip_masq: bool = True, accept: bool = False
) -> dict[str, Value]:
    """The keys of daemon.json that follow from subnet.env's variables, dockerd's names.

    `ip_masq=False` leaves ip-masq out, `accept` adds what the nftables backend needs. Raises Invalid.
    """
    settings: dict[str, Value] = {"bip": str(_gateway(variables)), "mtu": _mtu(variables)}
    if (docker_does := _docker_masquerades(variables, ip_masq=ip_masq)) is not None:
        settings["ip-masq"] = docker_does
    if accept:
        settings |= {"allow-direct-routing": True, "bridge-accept-fwmark": ACCEPT_MARK}
    return settings


def network_arguments(
    variables: Mapping[str, str], *, ip_masq: bool = True, accept: bool = False
) -> list[str]:
    """Arguments of `docker network create`: bip split into subnet and gateway, the rest as the driver's options.

    `accept` opens the network to whoever can route to it (Docker 28 and newer): nat-unprotected. Raises Invalid.
    """
    gateway = _gateway(variables)
    options = {"com.docker.network.driver.mtu": str(_mtu(variables))}
    if (docker_does := _docker_masquerades(variables, ip_masq=ip_masq)) is not None:
        options["com.docker.network.bridge.enable_ip_masquerade"] = str(docker_does).lower()
    if accept:
        options["com.docker.network.bridge.gateway_mode_ipv4"] = "nat-unprotected"
    words = ["--driver=bridge", f"--subnet={gateway.network}", f"--gateway={gateway.ip}"]
    return [*words, *(f"--opt={name}={text}" for name, text in options.items())]


def merge(content: bytes, settings: Mapping[str, Value], *, name: str = "daemon.json") -> bytes:
    """daemon.json with these settings in it; every other key, its order and the spelling of all stay.

    An empty text becomes a new one. Raises Invalid for a text that is not one JSON object with each key once,
    Conflict for a key that dockerd refuses beside `bip`.
    """
    if not content.strip():
        return f"{json.dumps(settings, indent=2)}\n".encode()
    text, at, value = json_text.parse(content, name=name)
    if not isinstance(value, json_text.Object):
        raise Invalid(f"{name} is {json_text.describe(value)}, not an object")
    members: dict[str, json_text.Member] = {}
    for member in value:
        if members.setdefault(member.name, member) is not member:
            line, column = json_text.position(text, member.name_at)
            raise Invalid(f'{name} line {line}, column {column}: "{member.name}" stands there twice')
    _refuse_what_bip_excludes(members, settings, name)
    decoder = json.JSONDecoder()
    # From the end, so that the places before stay right.
    new = {key: wanted for key, wanted in settings.items() if key not in members}
    if new and value:
        last = value[-1]
        indent = _INDENT.search(text[: last.name_at])
        between = ",\n" + indent[1] if indent else ", "
        end = decoder.raw_decode(text, last.at)[1]
        text = (
            text[:end]
            + "".join(f"{between}{_member(key, wanted)}" for key, wanted in new.items())
            + text[end:]
        )
    elif new:
        lines = ",\n".join(f"  {_member(key, wanted)}" for key, wanted in new.items())
        text = f"{text[:at]}{{\n{lines}\n}}{text[decoder.raw_decode(text, at)[1] :]}"
    for member in reversed(value):
        wanted = settings.get(member.name, member.value)
        if member.value != wanted or isinstance(member.value, bool) is not isinstance(wanted, bool):
            end = decoder.raw_decode(text, member.at)[1]
            text = text[: member.at] + json.dumps(wanted) + text[end:]
    return text.encode()


def _refuse_what_bip_excludes(
    members: Mapping[str, json_text.Member], settings: Mapping[str, Value], name: str
) -> None:
    """dockerd would not start, and with it every container of the host."""
    bridge = members.get("bridge")
    if bridge is not None and bridge.value:
        raise Conflict(
            f'{name} has "bridge": {json.dumps(bridge.value)}, beside which dockerd takes no bip',
            hint='remove "bridge", or use flanctl docker-opts --format network',
        )
    fixed = members.get("fixed-cidr")
    if fixed is None:
        return
    subnet = IPv4Interface(str(settings["bip"])).network
    try:
        inside = IPv4Network(str(fixed.value), strict=False).subnet_of(subnet)
    except ValueError:
        inside = False
    if not inside:
        raise Conflict(
            f'{name} has "fixed-cidr": {json.dumps(fixed.value)}, which is no part of our subnet {subnet}',
            hint='remove "fixed-cidr", or choose a part of the subnet',
        )


def _member(key: str, value: Value) -> str:
    return f"{json.dumps(key)}: {json.dumps(value)}"


def _gateway(variables: Mapping[str, str]) -> IPv4Interface:
    text = variables.get("FLANNEL_SUBNET", "")
    try:
        gateway = IPv4Interface(text)
    except ValueError:
        gateway = None
    if gateway is None or gateway.ip == gateway.network.network_address:
        raise Invalid(f"FLANNEL_SUBNET is {text!r}, not a gateway and prefix such as 172.17.41.1/24")
    return gateway


def _mtu(variables: Mapping[str, str]) -> int:
    text = variables.get("FLANNEL_MTU", "")
    if not (text.isascii() and text.isdigit() and 68 <= int(text) <= 65535):  # RFC 791's least
        raise Invalid(f"FLANNEL_MTU is {text!r}, not a number of bytes")
    return int(text)


def _docker_masquerades(variables: Mapping[str, str], *, ip_masq: bool) -> bool | None:
    """What flannel does, docker must not; None: nobody said."""
    option = flannel_options(variables, ip_masq=ip_masq).get("DOCKER_OPT_IPMASQ")
    return None if option is None else option == "--ip-masq=true"
