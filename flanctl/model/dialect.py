"""Which of flannel's two sets of bytes and rules a network speaks.

Everything that differs between them asks the dialect; nothing else in flanctl compares versions.
"""

from __future__ import annotations

import enum

from flanctl.errors import Invalid


class Dialect(enum.Enum):
    """`V0_7` is flannel 0.7.1 on etcd v2, `V0_28` what flannel writes and checks from 0.15 on (etcd v3)."""

    V0_7 = "0.7"
    V0_28 = "0.28"

    @classmethod
    def parse(cls, text: str) -> Dialect:
        """Read a dialect's name as an operator writes it. Raises Invalid."""
        try:
            return cls(text)
        except ValueError:
            raise Invalid(
                f"dialect {text!r} is not known", hint="one of " + ", ".join(d.value for d in cls)
            ) from None

    def __str__(self) -> str:
        return self.value

    @property
    def writes_ipv6(self) -> bool:
        """Lease values carry `"PublicIPv6":null` even without IPv6 (flannel ≥ 0.15; flannel.md 3.2)."""
        return self is Dialect.V0_28

    @property
    def checks_config(self) -> bool:
        """flannel ≥ 0.10 has CheckNetworkConfig: four subnets at least, /30 at most (flannel.md 2.1)."""
        return self is Dialect.V0_28

    @property
    def short_escapes(self) -> bool:
        """Backspace and form feed are `\\b` and `\\f` in JSON strings, as Go ≥ 1.22 writes them (0.28's builds)."""
        return self is Dialect.V0_28

    def default_subnet_len(self, prefix_len: int) -> int:
        """SubnetLen of a network that names none (flannel.md 2.1): a /23 gets /24 in 0.7 and /25 in 0.28."""
        if self is Dialect.V0_7:
            return 24 if prefix_len < 24 else prefix_len + 1
        return 24 if prefix_len <= 22 else prefix_len + 2
