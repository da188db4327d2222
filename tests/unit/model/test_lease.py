"""A lease value is read whatever flannel wrote it, and written byte for byte as flannel writes it."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanctl.errors import Invalid
from flanctl.model.dialect import Dialect
from flanctl.model.lease import Lease, LeaseAttributes
from tests.unit.model.vectors import DIALECT_OF, Difference, load

FACTS = load("etcd-keys-and-values.json")["versions"]
WRITTEN = [
    (version, case["value"].encode()) for version in DIALECT_OF for case in FACTS[version]["lease_values"]
]
READ = [(version, case) for version in DIALECT_OF for case in FACTS[version]["unmarshal"]]

DIFFERENCES = (
    Difference("names no host", "flannel reads {} as PublicIP 0.0.0.0 and would send packets there"),
    Difference("not an IPv4 address", "0.7.1 and 0.20 panic at an IPv6 text in PublicIP"),
)

FROM_FLANNEL_MD = (
    (Dialect.V0_7, b'{"PublicIP":"192.168.6.2"}'),
    (Dialect.V0_7, b'{"PublicIP":"192.168.6.2","BackendType":"host-gw"}'),
    (
        Dialect.V0_7,
        b'{"PublicIP":"192.168.6.2","BackendType":"vxlan","BackendData":{"VtepMAC":"82:4b:b6:2f:54:4e"}}',
    ),
    (Dialect.V0_28, b'{"PublicIP":"192.168.6.2","PublicIPv6":null}'),
    (
        Dialect.V0_28,
        (
            b'{"PublicIP":"192.168.6.2","PublicIPv6":null,"BackendType":"vxlan",'
            b'"BackendData":{"VNI":1,"VtepMAC":"82:4b:b6:2f:54:4e"}}'
        ),
    ),
    (
        Dialect.V0_28,
        (
            b'{"PublicIP":"192.168.6.2","PublicIPv6":"fc00:66::1","BackendType":"wireguard",'
            b'"BackendData":{"PublicKey":"a+/=","Port":51820},"BackendV6Data":{"PublicKey":"a+/=","Port":51821}}'
        ),
    ),
    (Dialect.V0_28, b'{"PublicIP":"0.0.0.0","PublicIPv6":"fc00:66::1"}'),
    # what the command of an extension backend may print, through any Go
    (
        Dialect.V0_28,
        rb'{"PublicIP":"1.2.3.4","PublicIPv6":null,"BackendType":"extension","BackendData":"\b\u0008\ufffd"}',
    ),
    (
        Dialect.V0_28,
        '{"PublicIP":"1.2.3.4","PublicIPv6":null,"BackendData":"\\u2028ä\\r\\n\\u001b"}'.encode(),
    ),
    # somebody else's fields and spellings
    (
        Dialect.V0_28,
        b'{"PublicIP":"1.2.3.4","PublicIPv6":null,"BackendData":[1e3,0.10,-0,123456789012345678901]}',
    ),
    (Dialect.V0_28, b'{"PublicIP":"1.2.3.4","PublicIPv6":null,"Zone":"b","Rack":{"z":1,"a":null}}'),
)


@pytest.mark.parametrize(("version", "value"), WRITTEN)
def test_what_flannel_wrote_is_written_back_byte_for_byte(version: str, value: bytes) -> None:
    assert LeaseAttributes.parse(value).format(DIALECT_OF[version]) == value


@pytest.mark.parametrize(("dialect", "value"), FROM_FLANNEL_MD)
def test_stored_bytes_survive_reading_and_writing(dialect: Dialect, value: bytes) -> None:
    assert LeaseAttributes.parse(value).format(dialect) == value


@pytest.mark.parametrize(("version", "case"), READ)
def test_flannels_reading_is_ours_but_for_the_table(version: str, case: dict[str, Any]) -> None:
    try:
        attributes = LeaseAttributes.parse(case["value"].encode())
    except Invalid as error:
        if not case.get("error"):
            assert [difference for difference in DIFFERENCES if difference.says in str(error)]
        return
    assert case["error"] is None
    assert attributes.format(DIALECT_OF[version]).decode() == case["remarshalled"]


def test_every_difference_is_exercised() -> None:
    seen: set[Difference] = set()
    for _, case in READ:
        if case.get("error"):
            continue
        try:
            LeaseAttributes.parse(case["value"].encode())
        except Invalid as error:
            seen.update(difference for difference in DIFFERENCES if difference.says in str(error))
    assert seen == set(DIFFERENCES)


def test_one_lease_has_other_bytes_in_each_dialect() -> None:
    attributes = LeaseAttributes(IPv4Address("192.168.6.2"))
    assert attributes.format(Dialect.V0_7) == b'{"PublicIP":"192.168.6.2"}'
    assert attributes.format(Dialect.V0_28) == b'{"PublicIP":"192.168.6.2","PublicIPv6":null}'


def test_keys_are_found_in_any_case_and_the_last_of_two_wins() -> None:
    attributes = LeaseAttributes.parse(b'{"publicip":"1.2.3.4","PUBLICIP":"1.2.3.5","backendtype":""}')
    assert attributes == LeaseAttributes(IPv4Address("1.2.3.5"))


def test_backend_data_is_json_as_python_knows_it() -> None:
    attributes = LeaseAttributes.parse(b'{"PublicIP":"1.2.3.4","BackendData":{"VNI":1,"VtepMAC":"82:4b"}}')
    assert attributes.backend_data == {"VNI": 1, "VtepMAC": "82:4b"}
    assert json.dumps(attributes.backend_data) == '{"VNI": 1, "VtepMAC": "82:4b"}'


def test_a_lease_with_backend_data_can_be_in_a_set() -> None:
    attributes = LeaseAttributes.parse(b'{"PublicIP":"1.2.3.4","BackendData":{"VNI":1},"x":[]}')
    lease = Lease(IPv4Network("172.17.41.0/24"), attributes, revision=7, reservation=False)
    assert {lease, lease} == {lease}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (b"", "lease value line 1, column 1: the text is empty"),
        (b"[]", "a list, not an object"),
        (b'{"PublicIP":"1.2.3.4"} x', 'unexpected "x" after the end'),
        (b'{"PublicIP":17}', "PublicIP is the number 17"),
        (b'{"PublicIP":"1.2.3.4/24"}', "not an IPv4 address"),
        (b'{"PublicIP":"::ffff:1.2.3.4"}', "not an IPv4 address"),
        (rb'{"PublicIP":"1.2.3.\u0034"}', "not an IPv4 address"),
        (b'{"PublicIP":"0.0.0.0"}', "names no host"),
        (b'{"PublicIP":"1.2.3.4","PublicIPv6":"1.2.3.4"}', "PublicIPv6"),
        (b'{"PublicIP":"1.2.3.4","PublicIPv6":"fe80::1%eth0"}', "PublicIPv6"),
        (b'{"PublicIP":"1.2.3.4","PublicIPv6":""}', "PublicIPv6"),
        (b'{"PublicIP":"1.2.3.4","BackendType":["udp"]}', "BackendType is a list"),
        (b"/jxdd/network/subnets/172.17.41.0-24", "no comments"),  # flannel's documented reservation command
        (b'{"PublicIP":"1.2.3.4","BackendData":' + b"[" * 10_000, "nesting"),
        (b'{"PublicIP":"1.2.3.4","BackendData":NaN}', "NaN"),
        (b'{"PublicIP":"1.2.3.\xff"}', "not UTF-8"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_strange_value_is_invalid(value: bytes, says: str) -> None:
    with pytest.raises(Invalid) as caught:
        LeaseAttributes.parse(value)
    assert says in str(caught.value)
    assert caught.value.id == "bad-value"


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
JSON = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: (
        st.lists(inner | st.none(), max_size=3) | st.dictionaries(TEXT, inner | st.none(), max_size=3)
    ),
    max_leaves=8,
)
KNOWN = {"publicip", "publicipv6", "backendtype", "backenddata", "backendv6data"}
ATTRIBUTES = st.builds(
    LeaseAttributes,
    st.integers(1, 2**32 - 1).map(IPv4Address),
    st.none() | st.integers(0, 2**128 - 1).map(IPv6Address),
    st.none() | TEXT.filter(bool),
    st.none() | JSON,
    st.none() | JSON,
    st.dictionaries(TEXT.filter(lambda name: name.casefold() not in KNOWN), JSON, max_size=2).map(
        lambda fields: tuple(fields.items())
    ),
)


@given(ATTRIBUTES)
def test_what_is_formatted_is_read_back(attributes: LeaseAttributes) -> None:
    written = attributes.format(Dialect.V0_28)
    again = LeaseAttributes.parse(written)
    assert again == attributes
    assert hash(again) == hash(attributes)
    assert again.format(Dialect.V0_28) == written


@given(ATTRIBUTES)
def test_0_7_loses_only_ipv6(attributes: LeaseAttributes) -> None:
    again = LeaseAttributes.parse(attributes.format(Dialect.V0_7))
    assert again.public_ipv6 is None
    assert again.backend_v6_data is None
    assert (again.public_ip, again.backend_type, again.backend_data, again.unknown) == (
        attributes.public_ip,
        attributes.backend_type,
        attributes.backend_data,
        attributes.unknown,
    )


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_at_most_invalid(value: bytes) -> None:
    with pytest.raises(Invalid):
        LeaseAttributes.parse(value)


@given(
    st.dictionaries(
        st.sampled_from(["PublicIP", "PublicIPv6", "BackendType", "BackendData", "x"]), JSON | st.none()
    )
)
def test_odd_values_are_at_most_invalid(document: dict[str, Any]) -> None:
    document.setdefault("PublicIP", "1.2.3.4")
    try:
        attributes = LeaseAttributes.parse(json.dumps(document).encode())
    except Invalid:
        return
    assert LeaseAttributes.parse(attributes.format(Dialect.V0_28)) == attributes


OCTETS = st.lists(
    st.integers(0, 255).map(str) | st.sampled_from(["00", "01", "256", "999", ""]), min_size=3, max_size=5
)


@given(OCTETS.map(".".join), st.sampled_from(["", ',"PublicIPv6":null']))
def test_the_quick_way_through_a_usual_value_reads_what_the_scanner_reads(address: str, rest: str) -> None:
    def read(text: str) -> LeaseAttributes | str:
        try:
            return LeaseAttributes.parse(text.encode())
        except Invalid as error:
            return error.id

    # A space is JSON all the same, and takes the other way.
    assert read(f'{{"PublicIP":"{address}"{rest}}}') == read(f'{{"PublicIP": "{address}"{rest}}}')
