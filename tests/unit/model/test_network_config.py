"""A network config is read as flannel reads it, and refused with a reason where flannel panics, guesses or fails."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanctl.errors import Invalid
from flanctl.model.dialect import Dialect
from flanctl.model.network_config import ConfigError, NetworkConfig, compose_config
from tests.unit.model.vectors import DIALECT_OF, Difference, load

VECTORS = load("config-validation.json")["vectors"]
CASES = [(case["input"], version, case["expected"][version]) for case in VECTORS for version in DIALECT_OF]
PSK = "x" * 96

DIFFERENCES = (
    Difference("every address there is", "0.7.1 reads 0.0.0.0/0 as the network; no host can route that"),
    Difference("Network is missing", "0.7.1 takes a missing Network for 0.0.0.0/0"),
    Difference("is IPv6, an IPv4 network", "0.7.1 and 0.20 panic at an IPv6 Network"),
    Difference("is too small", "0.7.1 makes /31 and /32 subnets, in which no container has room"),
    Difference("must be below 31", "0.7.1 takes any SubnetLen, /31 to /64 too"),
    Difference("is not on a boundary", "0.7.1 hands out 172.17.10.5/24, which moves the bridge (#430)"),
    Difference("is below SubnetMin", "every flannel takes Min above Max, then is `out of subnets` for ever"),
    Difference("leaves no subnet", "0.7.1 takes SubnetLen = prefix, then is `out of subnets` for ever"),
    Difference("given twice", "every flannel takes the last of two equal keys, people see the first"),
    Difference("is not an option of", "every flannel ignores it: a misspelt option looks as if it worked"),
    Difference("Backend.Type is missing", "every flannel fails later: `unknown backend type: `"),
    Difference("is not a backend of", "every flannel fails later: `unknown backend type: X`"),
    Difference(
        "Backend.Port must be a whole number", "every flannel fails later, in the backend's own parsing"
    ),
    Difference("Backend.VNI 99999999 is not in", "every flannel fails later or announces another VNI"),
    Difference("Backend.PSK is missing", "0.20 and 0.28 fail later: `config error, password is too short`"),
    Difference(
        "without IPv4 is not supported", "0.20 and 0.28 die later: `none defined stack`, or are IPv6-only"
    ),
    Difference("IPv6 is not supported", "not built yet; flannel's own with etcd is half done (#2293)"),
    Difference("written with escapes", "no flannel decodes escapes in addresses, so neither may we"),
)

BEYOND_THE_VECTORS = (
    ('{"Network":"fc00::/48"}', "v0.7.1"),
    ('{"Network":"fc00::/48"}', "v0.28.9"),
    ('{"Network":"::ffff:10.1.0.0/112"}', "v0.28.9"),
    ('{"Network":"172.17.0.0/16","SubnetMin":"172.17.20.0","SubnetMax":"172.17.10.0"}', "v0.7.1"),
    ('{"Network":"172.17.0.0/16","SubnetMin":"172.17.20.0","SubnetMax":"172.17.10.0"}', "v0.28.9"),
    ('{"Network":"172.17.0.0/16","SubnetMax":"172.17.0.0"}', "v0.28.9"),
    ('{"Network":"172.17.0.0/16","SubnetLen":16}', "v0.7.1"),
    ('{"Network":"255.0.0.0/8","SubnetLen":8,"SubnetMax":"255.0.0.0"}', "v0.7.1"),
    ('{"Network":"172.17.0.0/16","Backend":{"Type":"warp"}}', "v0.28.9"),
    ('{"Network":"172.17.0.0/16","Backend":{"Type":"ipip"}}', "v0.7.1"),
    ('{"Network":"172.17.0.0/16","Backend":{"Type":"gce"}}', "v0.28.9"),
    ('{"Network":"172.17.0.0/16","Backend":{}}', "v0.28.9"),
    ('{"Network":"172.17.0.0/16","Backend":null}', "v0.28.9"),
    ('{"Network":"172.17.0.0/16","Backend":{"Type":"vxlan","VNI":99999999}}', "v0.28.9"),
    ('{"Network":"172.17.0.0/16","Backend":{"Type":"ipsec"}}', "v0.28.9"),
    ('{"Network":"172.17.0.0\\/16"}', "v0.28.9"),
)
"""From flannel.md 2 and 5.1, where the vectors have no case."""


def parse(text: bytes | str, version: str = "v0.28.9") -> NetworkConfig:
    return NetworkConfig.parse(text, DIALECT_OF[version], name="net.json")


def refusal(text: bytes | str, version: str = "v0.28.9") -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(text, version)
    return caught.value


def differences_in(error: ConfigError) -> list[Difference]:
    return [difference for difference in DIFFERENCES if difference.says in str(error)]


def is_0_20_only(text: str, version: str) -> bool:
    """EnableNFTables came with 0.25: 0.20 ignores it, whatever its type. The dialect is 0.28's."""
    return version == "v0.20.0" and "EnableNFTables" in text


@pytest.mark.parametrize(("text", "version", "expected"), CASES)
def test_flannels_verdict_is_ours_but_for_the_table(
    text: str, version: str, expected: dict[str, Any]
) -> None:
    if is_0_20_only(text, version):
        assert "result" in expected
        return
    try:
        config = parse(text, version)
    except ConfigError as error:
        if "result" in expected or "panic" in expected:
            assert differences_in(error), f"flannel says {expected}, we say: {error}"
        return
    assert "result" in expected, f"flannel says {expected}, we accept"
    result = expected["result"]
    effective = config.effective()
    for key in ("Network", "SubnetLen", "SubnetMin", "SubnetMax"):
        assert effective[key] == result[key]
    assert config.backend_type == expected["backend_type"].lower()


def test_every_difference_is_exercised_and_only_by_what_flannel_would_take() -> None:
    seen: set[Difference] = set()
    taken = [(text, version) for text, version, said in CASES if "result" in said or "panic" in said]
    for text, version in (*taken, *BEYOND_THE_VECTORS):
        try:
            parse(text, version)
        except ConfigError as error:
            seen.update(differences_in(error))
    assert seen == set(DIFFERENCES)


@pytest.mark.parametrize(("text", "version"), BEYOND_THE_VECTORS)
def test_what_flannel_would_regret_is_refused(text: str, version: str) -> None:
    assert differences_in(refusal(text, version))


@pytest.mark.parametrize(
    ("text", "where", "field", "says"),
    [
        ("", (1, 1), None, "the text is empty"),
        ("[]", (1, 1), None, "a config is a JSON object, not a list"),
        ("{}", (1, 1), "Network", "Network is missing"),
        ('{"Network":17}', (1, 12), "Network", 'must be text like "172.17.0.0/16", not the number 17'),
        ('{"Network":null}', (1, 12), "Network", "not null"),
        ('{"Network":"172.17.0.0"}', (1, 12), "Network", "172.17.0.0 has no prefix length"),
        ('{"Network":"172.17.0.0/33"}', (1, 12), "Network", "no prefix length from 0 to 32"),
        ('{"Network":"172.17.0.0/255.255.0.0"}', (1, 12), "Network", "no prefix length from 0 to 32"),
        ('{"Network":"172.17.0/16"}', (1, 12), "Network", "is not an IPv4 network"),
        ('{"Network":"172.17.000.0/16"}', (1, 12), "Network", "is not an IPv4 network"),
        ('{"Network":" 172.17.0.0/16"}', (1, 12), "Network", "is not an IPv4 network"),
        ('{"Network":"\u202e\x9b/16"}', (1, 12), "Network", r'"\u202e\x9b/16" is not an IPv4 network'),
        (
            '{\n  "Network": "172.17.0.0/16",\n  "SubnetLen": 31\n}',
            (3, 16),
            "SubnetLen",
            "net.json line 3, column 16: SubnetLen 31 must be below 31",
        ),
        ('{"Network":"10.1.0.0/16","subnetlen":24.0}', (1, 38), "SubnetLen", "not the number 24.0"),
        ('{"Network":"10.1.0.0/16","SubnetLen":2e1}', (1, 38), "SubnetLen", "not the number 2e1"),
        ('{"Network":"10.1.0.0/16","SubnetLen":-24}', (1, 38), "SubnetLen", "must not be negative"),
        ('{"Network":"10.1.0.0/16","SubnetLen":true}', (1, 38), "SubnetLen", "not true"),
        ('{"Network":"10.1.0.0/16","SubnetLen":' + "9" * 200 + "}", (1, 38), "SubnetLen", "999... must be"),
        ('{"Network":"10.1.0.0/29"}', (1, 12), "Network", "10.1.0.0/29 is too small, /28 is the least"),
        ('{"Network":"10.1.0.0/16","SubnetLen":17}', (1, 38), "SubnetLen", "fewer than four subnets"),
        (
            '{"Network":"10.1.0.0/16","SubnetMax":"10.2.0.0"}',
            (1, 38),
            "SubnetMax",
            "outside Network 10.1.0.0/16",
        ),
        ('{"Network":"10.1.0.0/16","SubnetMax":"10.1.9.1"}', (1, 38), "SubnetMax", "boundary of /24 subnets"),
        ('{"Network":"10.1.0.0/16","SubnetMin":null}', (1, 38), "SubnetMin", "not null"),
        ('{"Network":"10.1.0.0/16","Backend":7}', (1, 36), "Backend", "must be an object"),
        ('{"Network":"10.1.0.0/16","Backend":{"Type":7}}', (1, 44), "Backend.Type", "not the number 7"),
        (
            '{"Network":"10.1.0.0/16","Backend":{"Type":"udp","Port":0}}',
            (1, 57),
            "Backend.Port",
            "Backend.Port 0 is not in 1..65535",
        ),
        (
            '{"Network":"10.1.0.0/16","Backend":{"Type":"udp","Prot":1}}',
            (1, 50),
            "Backend.Prot",
            "Backend.Prot is not an option of udp",
        ),
        (
            '{"Network":"10.1.0.0/16","Backend":{"Type":"udp","\x9b":1}}',
            (1, 50),
            r"Backend.\x9b",
            r"Backend.\x9b is not an option of udp",
        ),
        (
            '{"Network":"10.1.0.0/16",\n"network":"10.1.0.0/16"}',
            (2, 1),
            "Network",
            "Network is given twice, first at line 1, column 2",
        ),
        ('{"x":1,"X":2}', (1, 8), '"X"', '"X" is given twice, first at line 1, column 2'),
        (
            '{"Network":"10.1.0.0/16","IPv6Network":"10.2.0.0/16"}',
            (1, 40),
            "IPv6Network",
            "not an IPv6 network",
        ),
        (
            '{"Network":"10.1.0.0/16","IPv6SubnetMin":"fc00::/9"}',
            (1, 42),
            "IPv6SubnetMin",
            "not an IPv6 address",
        ),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_refusal_names_line_column_and_field(
    text: str, where: tuple[int, int], field: str | None, says: str
) -> None:
    error = refusal(text)
    assert (error.line, error.column) == where
    assert error.field == field
    assert says in str(error)
    assert str(error).startswith("net.json line ")
    assert error.exit_code == 6


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        ('{"Type":"vxlan","GBP":1}', "Backend.GBP must be true or false, not the number 1"),
        ('{"Type":"vxlan","MTU":67}', "Backend.MTU 67 is not in 68..65535"),
        ('{"Type":"wireguard","Mode":"both"}', "must be one of separate, auto, ipv4, ipv6"),
        ('{"Type":"wireguard","PSK":"a\\u0000"}', "contains a NUL character"),
        ('{"Type":"ipsec","PSK":"short"}', "has 5 characters, at least 96"),
        ('{"Type":"extension","PreStartupCommand":["ls"]}', "must be text, not a list"),
        ('{"Type":"host-gw","Port":1}', "is not an option of host-gw"),
    ],
)
def test_a_backends_options_are_checked_now_not_in_the_backend(backend: str, says: str) -> None:
    assert says in str(refusal(f'{{"Network":"10.1.0.0/16","Backend":{backend}}}'))


@pytest.mark.parametrize(
    ("backend", "effective"),
    [
        ('{"TYPE":"UDP","port":8000}', {"Type": "udp", "Port": 8000}),
        ('{"Type":"udp","Port":null}', {"Type": "udp", "Port": 8285}),
        (
            '{"Type":"vxlan","VNI":70000,"directrouting":true}',
            {
                "Type": "vxlan",
                "VNI": 70000,
                "Port": 0,
                "GBP": False,
                "DirectRouting": True,
                "Learning": False,
            },
        ),
        ('{"Type":"alloc"}', {"Type": "alloc"}),
        (
            f'{{"Type":"ipsec","PSK":"{PSK}"}}',
            {
                "Type": "ipsec",
                "PSK": PSK,
                "UDPEncap": False,
                "ESPProposal": "aes128gcm16-sha256-prfsha256-ecp256",
            },
        ),
    ],
)
def test_effective_fills_in_the_backends_defaults(backend: str, effective: dict[str, object]) -> None:
    assert parse(f'{{"Network":"10.1.0.0/16","Backend":{backend}}}').effective()["Backend"] == effective


@pytest.mark.parametrize(
    ("text", "version", "warning"),
    [
        (
            '{"Network":"10.1.0.0/16","SubnetLenght":24}',
            "v0.28.9",
            'net.json line 1, column 26: flannel 0.28 does not know "SubnetLenght" and ignores it; is SubnetLen meant?',
        ),
        ('{"Network":"10.1.0.0/16","x\x1b[2J":24}'.replace("\x1b", "\\u001b"), "v0.28.9", r'"x\x1b[2J"'),
        ('{"Network":"10.1.0.0/16","EnableIPv6":true}', "v0.7.1", 'flannel 0.7 does not know "EnableIPv6"'),
        (
            '{"Network":"10.1.2.3/16"}',
            "v0.28.9",
            "Network 10.1.2.3/16 has host bits set, 10.1.0.0/16 is meant",
        ),
        ('{"Network":"224.1.0.0/16"}', "v0.28.9", "overlaps 224.0.0.0/4"),
        ('{"Network":"10.1.0.0/16","EnableNFTables":true}', "v0.28.9", "EnableNFTables is ignored"),
        ('{"Network":"10.1.0.0/16","IPv6SubnetLen":64}', "v0.28.9", "IPv6SubnetLen is ignored"),
        (
            '{"Network":"10.1.0.0/16","Backend":{"Type":"extension","ShutdownCommand":"x"}}',
            "v0.28.9",
            "Backend.ShutdownCommand is never read by flannel",
        ),
    ],
)
def test_what_is_odd_but_harmless_is_a_warning(text: str, version: str, warning: str) -> None:
    (said,) = parse(text, version).warnings
    assert warning in said


def test_a_plain_config_has_no_warning() -> None:
    assert parse('{"Network":"172.17.0.0/16","EnableIPv4":null,"EnableIPv6":false}').warnings == ()


def test_thousands_of_unknown_keys_are_a_dozen_warnings() -> None:
    keys = ",".join(f'"k{number}":0' for number in range(20_000))
    warnings = parse(f'{{"Network":"10.1.0.0/16",{keys}}}').warnings
    assert len(warnings) == 11
    assert warnings[-1].endswith("19990 more keys are not known")


def test_capacity_counts_from_min_to_max_and_subnets_lists_them() -> None:
    config = parse('{"Network":"172.17.0.0/16","SubnetMin":"172.17.10.0","SubnetMax":"172.17.12.0"}')
    subnets = [IPv4Network(f"172.17.{third}.0/24") for third in (10, 11, 12)]
    assert config.capacity == 3
    assert list(config.subnets()) == subnets
    assert [config.subnet_at(index) for index in range(3)] == subnets
    for index in (-1, 3):
        with pytest.raises(IndexError):
            config.subnet_at(index)


def test_the_deployment_notes_network_has_255_subnets_from_1_to_255() -> None:
    config = parse('{"Network":"172.17.0.0/16"}', "v0.7.1")
    assert config.capacity == 255
    assert config.subnet_min == IPv4Address("172.17.1.0")
    assert config.subnet_max == IPv4Address("172.17.255.0")
    assert config.udp_port == 8285


@pytest.mark.parametrize(
    ("subnet", "accepted"),
    [
        ("172.17.10.0/24", True),
        ("172.17.12.0/24", True),
        ("172.17.9.0/24", False),
        ("172.17.13.0/24", False),
        ("172.17.10.0/25", False),
        ("172.17.10.0/23", False),
        ("10.0.10.0/24", False),
    ],
)
def test_a_subnet_is_accepted_inside_the_bounds_and_of_our_length(subnet: str, accepted: bool) -> None:
    config = parse('{"Network":"172.17.0.0/16","SubnetMin":"172.17.10.0","SubnetMax":"172.17.12.0"}')
    assert config.accepts(IPv4Network(subnet)) is accepted


def test_a_config_can_be_compared_and_hashed() -> None:
    one, other = parse('{"Network":"10.1.0.0/16"}'), parse('{ "network" : "10.1.0.0/16", "x" : 1 }')
    assert one == other
    assert hash(one) == hash(other)


@st.composite
def configs(draw: st.DrawFn) -> tuple[NetworkConfig, str]:
    """Any config that is right, and its text."""
    dialect = draw(st.sampled_from(Dialect))
    version = "v0.7.1" if dialect is Dialect.V0_7 else "v0.28.9"
    prefix = draw(st.integers(1, 26))
    network = IPv4Network((draw(st.integers(0, 2**32 - 1)), prefix), strict=False)
    length = draw(st.none() | st.integers(prefix + 2, 30))
    size = 1 << (32 - (length or dialect.default_subnet_len(prefix)))
    first, last = sorted(draw(st.integers(0, network.num_addresses // size - 1)) for _ in range(2))
    lowest = IPv4Address(int(network.network_address) + max(first, 1) * size)
    highest = IPv4Address(int(network.network_address) + max(last, 1) * size)
    backend, options = draw(
        st.sampled_from(
            [
                (None, None),
                ("udp", {"Port": "8000"}),
                ("VXLAN", {"vni": "7", "GBP": "true"}),
                ("host-gw", None),
            ]
        )
    )
    text = compose_config(
        network=network,
        subnet_len=length,
        subnet_min=draw(st.sampled_from([None, lowest])),
        subnet_max=draw(st.sampled_from([None, highest])),
        backend=backend,
        backend_options=options,
    )
    return parse(text, version), text


@given(configs())
def test_effective_is_a_config_that_means_the_same(made: tuple[NetworkConfig, str]) -> None:
    config, _ = made
    again = NetworkConfig.parse(json.dumps(config.effective()), config.dialect)
    assert again.effective() == config.effective()
    assert again.effective() == NetworkConfig.parse(json.dumps(again.effective()), config.dialect).effective()


@given(configs(), st.data())
def test_every_subnet_lies_in_the_network_and_is_accepted(
    made: tuple[NetworkConfig, str], data: st.DataObject
) -> None:
    config, _ = made
    assert config.capacity >= 1
    subnet = config.subnet_at(data.draw(st.integers(0, config.capacity - 1)))
    assert subnet.subnet_of(config.network)
    assert config.accepts(subnet)
    assert config.subnet_at(0).network_address == config.subnet_min
    assert config.subnet_at(config.capacity - 1).network_address == config.subnet_max


def test_a_composed_config_is_what_the_deployment_note_wrote() -> None:
    assert compose_config(network="172.17.0.0/16") == '{"Network":"172.17.0.0/16"}'


def test_an_option_composed_twice_is_refused_not_lost() -> None:
    text = compose_config(network="10.1.0.0/16", backend="udp", backend_options={"Port": "1", "port": "2"})
    assert "Backend.Port is given twice" in str(refusal(text))


def test_a_composed_config_keeps_flannels_order_and_types() -> None:
    text = compose_config(
        network=IPv4Network("10.1.0.0/16"),
        subnet_len=26,
        subnet_min="10.1.1.0",
        subnet_max=IPv4Address("10.1.9.0"),
        backend="vxlan",
        backend_options={"vni": "7", "DirectRouting": "true", "Odd": "1", "GBP": "maybe", "Port": "x"},
    )
    assert text == (
        '{"Network":"10.1.0.0/16","SubnetLen":26,"SubnetMin":"10.1.1.0","SubnetMax":"10.1.9.0",'
        '"Backend":{"Type":"vxlan","VNI":7,"DirectRouting":true,"Odd":"1","GBP":"maybe","Port":"x"}}'
    )


@given(st.binary(max_size=200), st.sampled_from(Dialect))
def test_arbitrary_bytes_are_at_most_invalid(text: bytes, dialect: Dialect) -> None:
    with pytest.raises(Invalid):
        NetworkConfig.parse(text, dialect)


_KEYS = st.sampled_from(
    [
        "Network",
        "SubnetLen",
        "subnetmin",
        "SubnetMax",
        "Backend",
        "EnableIPv4",
        "EnableIPv6",
        "IPv6Network",
        "x",
    ]
)
_ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2**70),
    st.floats(),
    st.sampled_from(
        ["10.1.0.0/16", "fc00::/48", "10.1.3.0", "255.255.255.255/31", "128.0.0.0/1", "", "0.0.0.0"]
    ),
    st.text(max_size=8),
    st.dictionaries(
        st.sampled_from(["Type", "Port", "VNI", "y"]),
        st.none() | st.integers(-1, 99999) | st.sampled_from(["udp", "VXLAN", "ipsec", ""]) | st.booleans(),
    ),
)


@given(st.dictionaries(_KEYS, _ODD, max_size=6), st.sampled_from(Dialect))
def test_odd_values_are_at_most_invalid(document: dict[str, Any], dialect: Dialect) -> None:
    try:
        config = NetworkConfig.parse(json.dumps(document), dialect)
    except Invalid:
        return
    assert config.capacity >= 1
    assert config.accepts(config.subnet_at(0))
