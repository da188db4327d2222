"""A lease's key is read as widely as flannel reads it, and written as flannel writes it."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanctl.errors import Invalid
from flanctl.model.subnet_key import SubnetKey
from tests.unit.model.vectors import DIALECT_OF, Difference, load

FACTS = load("etcd-keys-and-values.json")["versions"]
PARSED = [(version, case) for version in DIALECT_OF for case in FACTS[version]["parse_key"]]
MADE = [(version, case) for version in DIALECT_OF for case in FACTS[version]["make_key"]]

DIFFERENCES = (
    Difference("prefix length outside 1..31", "flannel reads /0: a lease on every address there is"),
    Difference("is not of the form", "0.7.1 searches anywhere in the key, so 172.17.41.0-24x is a subnet"),
)
ACCEPTED_DIFFERENTLY = {
    (
        "v0.7.1",
        "/jxdd/network/subnets/172.17.41.0-24&2001:cafe:42:5a::-64",
    ): "0.7.1 does not see IPv6 behind &",
    (
        "v0.7.1",
        "/p/10.0.0.0-8/subnets/172.17.9.0-24",
    ): "0.7.1 takes the first hit of the whole path: 10.0.0.0/8",
}


def last_component(key: str) -> str:
    """What our registry hands to SubnetKey: what stands behind `subnets/`, or all of it without that."""
    return key.rpartition("/subnets/")[2]


@pytest.mark.parametrize(("version", "case"), PARSED)
def test_flannels_reading_is_ours_but_for_the_tables(version: str, case: dict[str, Any]) -> None:
    try:
        key = SubnetKey.parse(last_component(case["key"]))
    except Invalid as error:
        if case["ipv4"] is not None:
            assert [difference for difference in DIFFERENCES if difference.says in str(error)]
        return
    if (version, case["key"]) in ACCEPTED_DIFFERENTLY:
        assert (str(key.subnet), key.subnet6 and str(key.subnet6)) != (case["ipv4"], case["ipv6"])
        return
    assert str(key.subnet) == case["ipv4"]
    assert (key.subnet6 and str(key.subnet6)) == case["ipv6"]


def test_every_difference_is_exercised() -> None:
    seen: set[Difference] = set()
    for _, case in PARSED:
        if case["ipv4"] is None:
            continue
        try:
            SubnetKey.parse(last_component(case["key"]))
        except Invalid as error:
            seen.update(difference for difference in DIFFERENCES if difference.says in str(error))
    assert seen == set(DIFFERENCES)
    assert ACCEPTED_DIFFERENTLY.keys() <= {(version, case["key"]) for version, case in PARSED}


@pytest.mark.parametrize(("version", "case"), MADE)
def test_a_key_is_made_as_flannel_makes_it(version: str, case: dict[str, Any]) -> None:
    with_ipv6 = case["ipv6"] and version != "v0.7.1"  # 0.7.1 knows no IPv6 and writes the first half
    key = SubnetKey(IPv4Network(case["ipv4"]), IPv6Network(case["ipv6"]) if with_ipv6 else None)
    assert key.format() == case["key"]


IPV4 = st.builds(
    lambda a, n: IPv4Network((a, n), strict=False), st.integers(0, 2**32 - 1), st.integers(1, 31)
)
IPV6 = st.builds(
    lambda a, n: IPv6Network((a, n), strict=False),
    # flannel writes an IPv4-mapped address with dots and then cannot read it; nobody has such a subnet
    st.integers(0, 2**128 - 1).filter(lambda a: a >> 32 != 0xFFFF),
    st.integers(0, 127),
)


@given(st.builds(SubnetKey, IPV4, st.none() | IPV6))
def test_what_is_formatted_is_read_back(key: SubnetKey) -> None:
    assert SubnetKey.parse(key.format()) == key


@pytest.mark.parametrize(
    ("name", "subnet"),
    [
        ("172.17.41.5-24", "172.17.41.0/24"),
        ("172.17.9.0-024", "172.17.9.0/24"),
        ("172.17.0.0-16", "172.17.0.0/16"),
    ],
)
def test_a_key_flannel_would_route_is_a_subnet_however_it_is_written(name: str, subnet: str) -> None:
    assert SubnetKey.parse(name).subnet == IPv4Network(subnet)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "-24",
        "172.17.x.0-24",
        "172.17.41.0-",
        "172.17.41.0",
        "172.17.41.0-24-24",
        "172.17.41.0-٢٤",
        "172.17.41.0--24",
        "172.17.41.0-+24",
        "172.17.41.0- 24",
        "172.17.41.0-24 ",
        " 172.17.41.0-24",
        "172.17.41.0-24/x",
        "172.17.041.0-24",
        "172.17.41.0-99999999999999999999",
        "0.0.0.0-0&fc00::-64",
        "172.17.41.0-24&",
        "172.17.41.0-24&FC00::-64",
        "172.17.41.0-24&fc00::%1-64",
        "172.17.41.0-24&::1.2.3.4-96",
        "172.17.41.0-24&fc00::-64&fc00::-64",
        "config",
    ],
)
def test_a_strange_key_is_invalid(name: str) -> None:
    with pytest.raises(Invalid) as caught:
        SubnetKey.parse(name)
    assert caught.value.id == "bad-key"


@given(st.text() | st.text(alphabet="0123456789.-&:af", max_size=40))
def test_arbitrary_names_are_at_most_invalid(name: str) -> None:
    try:
        key = SubnetKey.parse(name)
    except Invalid as error:
        assert str(error).isprintable()
    else:
        assert SubnetKey.parse(key.format()) == key


@given(
    st.lists(st.integers(0, 255) | st.sampled_from([256, 999]), min_size=4, max_size=4), st.integers(0, 33)
)
def test_a_usual_name_is_read_as_ipaddress_reads_it(octets: list[int], length: int) -> None:
    address = ".".join(map(str, octets))
    try:
        expected = IPv4Network(f"{address}/{length}", strict=False) if 1 <= length <= 31 else None
    except ValueError:
        expected = None
    try:
        assert SubnetKey.parse(f"{address}-{length}").subnet == expected
    except Invalid:
        assert expected is None
