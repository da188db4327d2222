"""daemon.json merged without losing a letter of it, and the arguments of docker network create."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanctl.errors import Conflict, Invalid
from flanctl.model.docker_formats import daemon_settings, merge, network_arguments

ENV = {"FLANNEL_SUBNET": "172.17.41.1/24", "FLANNEL_MTU": "1472", "FLANNEL_IPMASQ": "false"}
TOLD = {"bip": "172.17.41.1/24", "mtu": 1472, "ip-masq": True}
ACCEPT = {"allow-direct-routing": True, "bridge-accept-fwmark": "0x4000000/0x4000000"}


def test_the_settings_are_dockerds_names_and_types():
    assert daemon_settings(ENV) == TOLD
    assert daemon_settings(ENV, accept=True) == TOLD | ACCEPT
    assert daemon_settings(ENV, ip_masq=False) == {"bip": "172.17.41.1/24", "mtu": 1472}
    assert daemon_settings(ENV | {"FLANNEL_IPMASQ": "true"})["ip-masq"] is False


def test_a_file_that_is_not_there_or_empty_becomes_a_new_one():
    for content in (b"", b"\n \n"):
        assert json.loads(merge(content, TOLD)) == TOLD


def test_other_keys_their_order_and_their_spelling_stay():
    before = b'{\n\t"log-opts": {"max-size": "1\\u0030m"},\n\t"mtu" :1500,\n\t"n": 1.50,\n\t"dns": [ "1.1.1.1" ]\n}\n'
    assert merge(before, TOLD) == (
        b'{\n\t"log-opts": {"max-size": "1\\u0030m"},\n\t"mtu" :1472,\n\t"n": 1.50,\n\t"dns": [ "1.1.1.1" ],\n'
        b'\t"bip": "172.17.41.1/24",\n\t"ip-masq": true\n}\n'
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"{}", b'{\n  "bip": "172.17.41.1/24",\n  "mtu": 1472,\n  "ip-masq": true\n}'),
        (b'{"a":1}', b'{"a":1, "bip": "172.17.41.1/24", "mtu": 1472, "ip-masq": true}'),
        (
            b'{"ip-masq": 1, "bip": null, "mtu": [{}]}',
            b'{"ip-masq": true, "bip": "172.17.41.1/24", "mtu": 1472}',
        ),
    ],
)
def test_the_form_of_the_file_is_kept(before, after):
    assert merge(before, TOLD) == after
    assert merge(after, TOLD) == after, "a second time changes nothing"


_KEYS = st.one_of(st.sampled_from(["bip", "mtu", "ip-masq", "hosts"]), st.text(max_size=6))
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(_KEYS.filter(lambda key: key not in {"bridge", "fixed-cidr"}), _VALUES, max_size=6),
    st.sampled_from([None, 2, "\t"]),
    st.booleans(),
)
def test_any_object_merged_is_itself_with_ours_in_it(document, indent, ascii_only):
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only).encode()
    merged = merge(text, TOLD)
    assert json.loads(merged) == document | TOLD
    assert [key for key in json.loads(merged) if key in document] == list(document)
    assert merge(merged, TOLD) == merged


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": 1,}', "line 1, column 8"),
        (b'{"a": 1', "','"),
        (b"[1]", "a list, not an object"),
        (b"null", "null, not an object"),
        (b'{"mtu": 1500, "mtu": 1400}', '"mtu" stands there twice'),
        (b"\xff\xfe{\x00}\x00", "daemon.json"),
        (b'{"a": NaN}', "daemon.json"),
        (b'// mine\n{"a": 1}', "JSON has no comments"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(content, says):
    with pytest.raises(Invalid, match=r"daemon\.json") as caught:
        merge(content, TOLD)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"bridge": "br7"}', '"bridge": "br7"'),
        (b'{"fixed-cidr": "172.17.9.0/25"}', "no part of our subnet 172.17.41.0/24"),
        (b'{"fixed-cidr": 7}', "no part of our subnet"),
    ],
)
def test_what_dockerd_refuses_beside_bip_is_a_conflict(content, says):
    with pytest.raises(Conflict) as caught:
        merge(content, TOLD)
    assert says in str(caught.value)
    assert caught.value.hint


def test_a_fixed_range_inside_the_subnet_stays():
    assert json.loads(merge(b'{"fixed-cidr": "172.17.41.128/25", "bridge": ""}', TOLD))["bridge"] == ""


def test_a_network_has_subnet_and_gateway_apart():
    assert network_arguments(ENV) == [
        "--driver=bridge",
        "--subnet=172.17.41.0/24",
        "--gateway=172.17.41.1",
        "--opt=com.docker.network.driver.mtu=1472",
        "--opt=com.docker.network.bridge.enable_ip_masquerade=true",
    ]
    with_accept = network_arguments(ENV, ip_masq=False, accept=True)
    assert with_accept[3:] == [
        "--opt=com.docker.network.driver.mtu=1472",
        "--opt=com.docker.network.bridge.gateway_mode_ipv4=nat-unprotected",
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"FLANNEL_SUBNET": "172.17.41.0/24"},
        {"FLANNEL_SUBNET": "172.17.41.1/33"},
        {"FLANNEL_SUBNET": "--privileged"},
        {"FLANNEL_MTU": "14 72"},
        {"FLANNEL_MTU": "70000"},
        {"FLANNEL_IPMASQ": "maybe"},
    ],
)
def test_variables_that_mean_nothing_are_refused(wrong):
    for form in (daemon_settings, network_arguments):
        with pytest.raises(Invalid, match=next(iter(wrong))):
            form(ENV | wrong)
