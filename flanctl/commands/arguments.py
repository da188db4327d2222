"""Arguments that several commands take: subnets and public IPs, and how a shell completes them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING

from flanctl.errors import UsageError

if TYPE_CHECKING:
    import click
    from click.shell_completion import CompletionItem

COMPLETION_SECONDS = "0.5"
"""A shell that waits for its Tab key waits no longer for the registry."""


def subnet_or_address(text: str) -> IPv4Network | IPv4Address:
    """`172.17.41.0/24` or `192.168.6.2`. Raises UsageError."""
    try:
        if "/" in text:
            return IPv4Network(text, strict=False)
        return IPv4Address(text)
    except ValueError:
        raise UsageError(f'"{text}" is neither a subnet nor an address') from None


def exact_subnet(text: str) -> IPv4Network:
    """A subnet by its first address, as it must be where something is changed. Raises UsageError."""
    if "/" not in text or not isinstance(found := subnet_or_address(text), IPv4Network):
        raise UsageError(f'"{text}" is not a subnet like 172.17.41.0/24')
    if text.partition("/")[0] != str(found.network_address):
        raise UsageError(f"{text} is not the first address of a subnet", hint=f"{found} holds it")
    return found


def exact_subnet_or_address(text: str) -> IPv4Network | IPv4Address:
    """Raises UsageError, also for a subnet that is not aligned."""
    return exact_subnet(text) if "/" in text else subnet_or_address(text)


def leased(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Subnets and public IPs of the leases there are; nothing if the registry does not answer at once."""
    from click.shell_completion import CompletionItem

    from flanctl.commands.options import flags_of
    from flanctl.commands.session import session
    from flanctl.settings import resolve

    try:
        with session(resolve({**flags_of(context), "timeout": COMPLETION_SECONDS})) as registry:
            leases = registry.leases().table().leases
    except Exception:  # a Tab key shows no errors
        return []
    words = [str(lease.subnet) for lease in leases]
    words += dict.fromkeys(str(lease.attributes.public_ip) for lease in leases)
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]
