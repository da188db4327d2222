"""subnet.env is flannel's, byte for byte."""

from __future__ import annotations

from ipaddress import IPv4Interface, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanctl.errors import Invalid
from flanctl.model.subnet_file import SubnetFile

NOTE = (
    "FLANNEL_NETWORK=172.17.0.0/16\n"
    "FLANNEL_SUBNET=172.17.41.1/24\n"
    "FLANNEL_MTU=1472\n"
    "FLANNEL_IPMASQ=false\n"
)  # flannel.md 4.1


def test_a_lease_is_written_as_flannel_writes_it() -> None:
    file = SubnetFile.for_lease(
        IPv4Network("172.17.0.0/16"), IPv4Network("172.17.41.0/24"), mtu=1472, ip_masq=False
    )
    assert file.format() == NOTE


def test_the_subnet_is_read_back() -> None:
    file = SubnetFile.parse(NOTE.encode())
    assert file == SubnetFile(
        IPv4Network("172.17.0.0/16"), IPv4Interface("172.17.41.1/24"), 1472, ip_masq=False
    )
    assert file.subnet == IPv4Network("172.17.41.0/24")


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 28), st.integers(0, 4), st.integers(68, 65535), st.booleans()
)
def test_what_is_formatted_is_read_back(
    address: int, prefix: int, longer: int, mtu: int, ip_masq: bool
) -> None:
    network = IPv4Network((address, prefix), strict=False)
    subnet = IPv4Network((address, min(prefix + longer, 30)), strict=False)
    file = SubnetFile.for_lease(network, subnet, mtu, ip_masq)
    assert SubnetFile.parse(file.format()) == file
    assert file.subnet == subnet
    assert file.interface.ip == subnet.network_address + 1


def test_quotes_other_variables_and_comments_do_not_matter() -> None:
    text = NOTE.replace("172.17.41.1/24", '"172.17.41.1/24"') + "# by hand\nFLANNEL_IPV6_SUBNET=fc00::1/64\n"
    assert SubnetFile.parse(text) == SubnetFile.parse(NOTE)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "subnet.env: FLANNEL_NETWORK is missing"),
        (NOTE.replace("FLANNEL_MTU=1472\n", ""), "FLANNEL_MTU is missing"),
        (NOTE.replace("1472", "0"), "FLANNEL_MTU '0' is not a number from 68 to 65535"),
        (NOTE.replace("1472", "1472x"), "is not a number"),
        (NOTE.replace("false", "yes"), "FLANNEL_IPMASQ 'yes' is neither true nor false"),
        (NOTE.replace("41.1/24", "41.1"), "FLANNEL_SUBNET '172.17.41.1' is not like 172.17.41.1/24"),
        (NOTE.replace("41.1/24", "41.1/33"), "is not like"),
        (NOTE.replace("41.1/24", "41.1/255.255.255.0"), "is not like"),
        (NOTE.replace("172.17.41.1", "fc00::1"), "is not like"),
        (
            NOTE.replace("172.17.41.1", "172.18.41.1"),
            "172.18.41.1/24 is outside FLANNEL_NETWORK 172.17.0.0/16",
        ),
        (NOTE.replace("0.0/16", "0.1/16"), "FLANNEL_NETWORK 172.17.0.1/16 has host bits set"),
        (NOTE.replace("\n", "\r\n"), "line 1: Windows line end"),
    ],
)
def test_a_strange_file_is_invalid_and_says_which_variable(text: str, says: str) -> None:
    with pytest.raises(Invalid, match=r"subnet\.env") as caught:
        SubnetFile.parse(text)
    assert says in str(caught.value)


@given(st.integers(0, len(NOTE) - 1))
def test_a_half_written_file_is_never_taken_for_a_whole_one(length: int) -> None:
    with pytest.raises(Invalid):
        SubnetFile.parse(NOTE[:length])


@given(st.binary(max_size=100))
def test_arbitrary_bytes_are_at_most_invalid(text: bytes) -> None:
    with pytest.raises(Invalid):
        SubnetFile.parse(text)
