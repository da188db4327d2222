"""Which firewall rules name our port, and netlink attributes as bytes."""

import pytest

from flanctl.agent.kernel import attributes
from flanctl.agent.kernel.bypassed import _names


@pytest.mark.parametrize(
    ("rule", "names"),
    [
        ("-A INPUT -p udp -m udp --dport 8285 -j ACCEPT", True),
        ("-A INPUT -p udp -m multiport --dports 53,8000:9000 -j ACCEPT", True),
        ("-A INPUT -p udp -m udp --sport 8285 -j DROP", True),
        ("udp dport 8285 drop", True),
        ("udp dport { 53, 8285 } accept", True),
        ("udp dport 8000-9000 counter packets 0 bytes 0 drop", True),
        ("udp dport != 8285 drop", True),
        ("-A INPUT -p udp -m udp --dport 8286 -j ACCEPT", False),
        ("-A INPUT -p tcp -m tcp --dport 8285 -j ACCEPT", False),
        ("tcp dport 8285 accept", False),
        ("udp dport 18285 drop", False),
        ("-A INPUT -s 10.0.0.0/8 -j ACCEPT", False),
        (":INPUT ACCEPT [8285:8285]", False),
        ("# dport 8285", False),
        ("udp dport @ports drop", False),
    ],
)
def test_rules_that_name_the_port_are_found(rule: str, names: bool) -> None:
    assert _names(rule, 8285) is names


def test_attributes_are_padded_and_come_back() -> None:
    packed = attributes.pack((1, b"clsact\0"), (0x8002, attributes.pack((7, b"x"))), (3, b""))
    assert len(packed) % 4 == 0
    found = attributes.unpack(packed)
    assert found[1] == b"clsact\0"
    assert attributes.unpack(found[2]) == {7: b"x"}, "the bit for nesting is no part of the type"
    assert found[3] == b""


@pytest.mark.parametrize("length", range(30))
def test_what_is_cut_short_is_left_out(length: int) -> None:
    whole = attributes.unpack(attributes.pack((1, b"one"), (2, b"two!"), (3, b"three")))
    cut = attributes.unpack(attributes.pack((1, b"one"), (2, b"two!"), (3, b"three"))[:length])
    assert cut.items() <= whole.items()
