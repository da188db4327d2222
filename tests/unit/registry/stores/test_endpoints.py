"""Endpoints as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flanctl.errors import UsageError
from flanctl.registry.stores.endpoints import Endpoint, parse_endpoints


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://a:2379", "http://a:2379"),
        ("https://b:2379/", "https://b:2379"),
        ("192.168.6.15:4001", "http://192.168.6.15:4001"),
        ("etcd-1.example", "http://etcd-1.example:2379"),
        ("  HTTPS://B  ", "https://B:2379"),
        ("[::1]:2379", "http://[::1]:2379"),
        ("https://[fd00:0::1]", "https://[fd00::1]:2379"),
    ],
)
def test_each_way_of_writing_an_endpoint(text: str, url: str) -> None:
    (endpoint,) = parse_endpoints([text])
    assert str(endpoint) == url


def test_several_in_one_text_keep_their_order_and_come_once() -> None:
    found = parse_endpoints(["http://a:2379, https://b:2379,", "", "a:2379", "c"])
    assert found == (
        Endpoint("http", "a", 2379),
        Endpoint("https", "b", 2379),
        Endpoint("http", "c", 2379),
    )


@pytest.mark.parametrize(
    "text",
    [
        "ftp://a:1", "http://", "http://a:0", "http://a:65536", "http://a:b", "a b", "http://a/v2/keys",
        "::1", "[::1", "[::1]x", "[nonsense]:1", "1.2.3", "1.2.3.999", "http://a:", "http:///", "a:1:2", "-a",
        "http://a?x=1", "sqlite:/tmp/x", "https://ä:1", "http://a:²",
    ],
)  # fmt: skip
def test_nonsense_is_a_usage_error_that_names_it(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_endpoints(["http://good:2379", text])
    assert repr(text) in caught.value.message


def test_no_endpoint_at_all_is_said() -> None:
    with pytest.raises(UsageError, match="no etcd endpoint"):
        parse_endpoints([" , ", ""])


@pytest.mark.parametrize("text", ["http://root:secret@a:2379", "root:secret@a"])
def test_a_password_in_a_url_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_endpoints([text])
    assert "secret" not in caught.value.message


@settings(max_examples=200)
@given(st.text(max_size=40))
def test_any_text_is_read_or_refused_and_what_was_read_reads_again(text: str) -> None:
    try:
        found = parse_endpoints([text])
    except UsageError:
        return
    assert parse_endpoints([str(endpoint) for endpoint in found]) == found
