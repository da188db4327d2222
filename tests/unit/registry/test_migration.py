"""From v2 to v3: everything arrives with its time, nothing of others is touched, an interrupted run is run again."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanctl.errors import Conflict, Invalid, NotFound, RegistryUnreachable
from flanctl.model.dialect import Dialect
from flanctl.model.lease import LeaseAttributes
from flanctl.model.network_config import NetworkConfig
from flanctl.registry.leases import Leases
from flanctl.registry.migration import Migration, convert_config
from flanctl.registry.stores.memory import MemoryStore
from tests.support.clock import FakeClock

PREFIX = "/jxdd/network"
CONFIG = f"{PREFIX}/config"
FOLDER = f"{PREFIX}/subnets/"
NETWORK = b'{"Network":"172.17.0.0/16"}'
OLD, NEW = Dialect.V0_7, Dialect.V0_28


class Place:
    """Two stores, v2 with a config, two leases and a reservation."""

    def __init__(self):
        self.clock = FakeClock()
        self.v2, self.v3 = MemoryStore(self.clock), MemoryStore(self.clock)
        self.v2.create(CONFIG, NETWORK, ttl=None)
        self.v2.create(f"{FOLDER}172.17.41.0-24", b'{"PublicIP":"192.168.6.2"}', ttl=5000)
        self.v2.create(
            f"{FOLDER}172.17.55.0-24", b'{"PublicIP":"192.168.6.3","Rack":{"b":1,"a":2.50}}', ttl=86400
        )
        self.v2.create(f"{FOLDER}172.17.60.0-24", b'{"PublicIP":"192.168.6.4"}', ttl=None)

    def migration(self, v3=None):
        return Migration(
            Leases(self.v2, PREFIX, OLD, self.clock), Leases(v3 or self.v3, PREFIX, NEW, self.clock)
        )

    def run(self):
        migration = self.migration()
        return migration.carry_out(migration.plan())

    def there(self):
        entries = self.v3.with_ttl(self.v3.list(PREFIX).entries)
        return {entry.key.removeprefix(PREFIX): (entry.value, entry.ttl) for entry in entries}


WANTED = {
    "/config": (NETWORK, None),
    "/subnets/172.17.41.0-24": (b'{"PublicIP":"192.168.6.2","PublicIPv6":null}', 5000),
    "/subnets/172.17.55.0-24": (
        b'{"PublicIP":"192.168.6.3","PublicIPv6":null,"Rack":{"b":1,"a":2.50}}',
        86400,
    ),
    "/subnets/172.17.60.0-24": (b'{"PublicIP":"192.168.6.4","PublicIPv6":null}', None),
}


@pytest.fixture
def place():
    return Place()


def test_everything_arrives_in_v3s_bytes_with_the_time_it_has_left(place):
    before = place.v2.list("/")
    plan = place.migration().plan()
    assert [item.what for item in plan.items] == ["copy"] * 4
    assert plan.items[-1].kind == "config"
    assert place.there() == {}
    assert place.run() == 4
    assert place.there() == WANTED
    assert place.v2.list("/") == before
    assert place.run() == 0
    assert place.migration().plan().todo() == ()


def test_a_lease_that_was_reserved_in_v3_meanwhile_stays_reserved(place):
    place.run()
    entry = place.v3.get(f"{FOLDER}172.17.41.0-24")
    place.v3.replace(entry.key, entry.value, ttl=None, expected=entry.revision)
    assert place.run() == 0
    assert place.there()["/subnets/172.17.41.0-24"] == (entry.value, None)


@pytest.mark.parametrize("after_effect", [False, True])
def test_interrupted_at_any_step_it_is_run_again(after_effect):
    """Each call to v3 fails once, before or after it was carried out; the config is never there before a lease."""
    for step in range(100):
        place = Place()
        link = place.v3.another()
        link.fail("*", RegistryUnreachable("no answer"), skip=step, after_effect=after_effect)
        migration = place.migration(link)
        try:
            migration.carry_out(migration.plan())
        except RegistryUnreachable:
            pass
        else:
            break
        found = place.there()
        assert "/config" not in found or found == WANTED
        place.run()
        assert place.there() == WANTED
    assert step > 8


def test_what_v2s_hosts_do_meanwhile_is_taken_along(place):
    class Busy(MemoryStore):
        """A new host takes a subnet, and another renews, while the second key is written."""

        def create(self, key, value, *, ttl):
            if key.endswith("55.0-24"):
                place.v2.create(f"{FOLDER}172.17.70.0-24", b'{"PublicIP":"192.168.6.7"}', ttl=86400)
                old = place.v2.get(f"{FOLDER}172.17.41.0-24")
                place.v2.replace(old.key, old.value, ttl=86400, expected=old.revision)
            return super().create(key, value, ttl=ttl)

    place.v3 = Busy(place.clock)
    assert place.run() == 6
    found = place.there()
    assert found["/subnets/172.17.41.0-24"][1] == 86400
    assert found["/subnets/172.17.70.0-24"] == (b'{"PublicIP":"192.168.6.7","PublicIPv6":null}', 86400)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("config", b'{"Network":"10.5.0.0/16"}', "/jxdd/network/config in v3 is "),
        (
            "subnets/172.17.41.0-24",
            b'{"PublicIP":"192.168.6.99"}',
            "172.17.41.0/24 is 192.168.6.99's in v3 and 192.168.6.2's in v2",
        ),
        (
            "subnets/172.17.80.0-24",
            b'{"PublicIP":"192.168.6.99"}',
            "172.17.80.0/24 of 192.168.6.99 is in v3, which has no",
        ),
        ("subnets/garbage", b"", "/jxdd/network/subnets/garbage in v3 cannot be read: "),
        ("subnets/172.17.41.0-24", b"x", "/jxdd/network/subnets/172.17.41.0-24 in v3 cannot be read: "),
    ],
)
def test_it_refuses_when_v3_holds_something_else_and_writes_nothing(place, key, value, says):
    place.v3.create(f"{PREFIX}/{key}", value, ttl=None)
    before = place.v3.list("/")
    with pytest.raises(Conflict) as caught:
        place.run()
    assert caught.value.id == "target-differs"
    assert caught.value.details[0].startswith(says)
    assert place.v3.list("/") == before


@pytest.mark.parametrize(
    ("name", "ip", "says"),
    [
        ("172.17.80.0-24", "192.168.6.2", "192.168.6.2 has 172.17.80.0/24 in v3 and 172.17.41.0/24 in v2"),
        ("172.17.40.0-23", "192.168.6.9", "172.17.40.0/23 of 192.168.6.9 in v3 overlaps 172.17.41.0/24 of"),
        ("172.17.80.0-24", "192.168.6.9", None),
    ],
)
def test_beside_a_founded_v3_only_a_host_of_its_own_is_let_stand(place, name, ip, says):
    """It may have come after an earlier run."""
    place.run()
    place.v3.create(FOLDER + name, f'{{"PublicIP":"{ip}"}}'.encode(), ttl=100)
    if says is None:
        assert [str(lease.subnet) for lease in place.migration().plan().beyond] == ["172.17.80.0/24"]
        return
    with pytest.raises(Conflict) as caught:
        place.migration().plan()
    assert caught.value.details[0].startswith(says)


def test_a_host_that_lives_in_v3_already_is_not_set_back(place):
    place.run()
    entry = place.v3.get(f"{FOLDER}172.17.41.0-24")
    newer = b'{"PublicIP":"192.168.6.2","PublicIPv6":null,"BackendType":"vxlan"}'
    place.v3.replace(entry.key, newer, ttl=86400, expected=entry.revision)
    assert place.run() == 0
    assert place.there()["/subnets/172.17.41.0-24"] == (newer, 86400)
    # What v2 renews is newer again.
    old = place.v2.get(entry.key)
    place.clock.advance(7200)
    place.v2.create(f"{FOLDER}172.17.41.0-24", old.value, ttl=86400)  # the old one has ended
    assert place.run() == 1
    assert place.there()["/subnets/172.17.41.0-24"] == (WANTED["/subnets/172.17.41.0-24"][0], 86400)


def test_keys_nobody_understands_stay_behind_and_are_named(place):
    place.v2.create(f"{FOLDER}garbage", b"x", ttl=None)
    plan = place.migration().plan()
    assert [bad.key for bad in plan.unreadable] == [f"{FOLDER}garbage"]
    place.run()
    assert place.there() == WANTED


def test_without_a_config_there_is_nothing_to_migrate(place):
    place.v2.delete(CONFIG)
    with pytest.raises(NotFound) as caught:
        place.run()
    assert caught.value.id == "no-config"


def test_a_config_that_means_the_same_keeps_its_bytes():
    text = b' {"SubnetLen": 25, "Network": "172.17.0.0/16", "Backend": {"Type": "vxlan", "VNI": 7}}\n'
    assert convert_config(text, OLD, NEW, "config") == text


def test_a_config_that_would_mean_something_else_says_what_it_meant():
    """A /23 has /24 subnets in 0.7 and /25 in 0.28."""
    text = b'{"Network":"172.17.0.0/23"}'
    said = convert_config(text, NEW, OLD, "config")
    wanted = NetworkConfig.parse(text, NEW).effective()
    assert said != text
    assert NetworkConfig.parse(said, OLD).effective()["SubnetLen"] == wanted["SubnetLen"] == 25


@pytest.mark.parametrize("length", [23, 24, 25])
def test_a_network_too_small_for_v3s_flannel_is_refused(length):
    """0.7 makes two subnets of it, 0.28 wants four."""
    with pytest.raises(Invalid, match="fewer than four subnets") as caught:
        convert_config(f'{{"Network":"172.17.0.0/{length}"}}'.encode(), OLD, NEW, "config")
    assert caught.value.id == "config-not-portable"


def test_a_backend_that_v3s_flannel_has_not_is_refused_by_name(place):
    entry = place.v2.get(CONFIG)
    text = b'{"Network":"172.17.0.0/16","Backend":{"Type":"gce"}}'
    place.v2.replace(CONFIG, text, ttl=None, expected=entry.revision)
    with pytest.raises(Invalid, match="gce"):
        place.run()
    assert place.there() == {}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    backend=st.none() | st.sampled_from(["vxlan", "host-gw", "wireguard"]),
    data=st.none() | JSON,
    more=st.dictionaries(st.text(min_size=1, max_size=6), JSON, max_size=3),
)
def test_a_lease_that_goes_to_v3_and_back_is_the_same_bytes(backend, data, more):
    known = {"publicip", "publicipv6", "backendtype", "backenddata", "backendv6data"}
    more = {name: value for name, value in more.items() if name.casefold() not in known}
    attributes = LeaseAttributes(IPv4Address("192.168.6.2"), None, backend, data, unknown=tuple(more.items()))
    old = attributes.format(OLD)
    new = LeaseAttributes.parse(old).format(NEW)
    assert LeaseAttributes.parse(new).format(OLD) == old
    assert LeaseAttributes.parse(new).format(NEW) == new
