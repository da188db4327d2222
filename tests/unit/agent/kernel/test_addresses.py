"""Our own addresses, from the kernel's routing trie as text."""

from __future__ import annotations

import subprocess
import sys
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from flanctl.agent.kernel.addresses import local_addresses

if TYPE_CHECKING:
    from pathlib import Path

TRIE = """\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 192.0.2.0/24 2 0 2
        |-- 192.0.2.0
           /24 link UNICAST
        |-- 192.0.2.2
           /32 host LOCAL
        |-- 192.0.2.255
           /32 link BROADCAST
Local:
  +-- 127.0.0.0/8 2 0 2
     |-- 127.0.0.1
        /32 host LOCAL
     |-- 172.17.41.0
        /24 link UNICAST
        /32 host LOCAL
"""


def test_every_host_leaf_marked_local_is_ours(tmp_path: Path) -> None:
    trie = tmp_path / "fib_trie"
    trie.write_text(TRIE)
    assert local_addresses(str(trie)) == {IPv4Address(a) for a in ("127.0.0.1", "192.0.2.2", "172.17.41.0")}


def test_no_file_is_no_address(tmp_path: Path) -> None:
    assert local_addresses(str(tmp_path / "nothing")) == frozenset()


@given(st.text(alphabet=" \n|-+/.0123456789abcLOAhst"))
def test_no_text_ever_raises(tmp_path_factory: object, text: str) -> None:
    from pathlib import Path
    from tempfile import NamedTemporaryFile

    with NamedTemporaryFile("w", suffix=".trie") as file:
        file.write(text)
        file.flush()
        assert isinstance(local_addresses(str(Path(file.name))), frozenset)


def test_this_machine_has_its_loopback() -> None:
    assert IPv4Address("127.0.0.1") in local_addresses()


def test_asking_loads_no_netlink() -> None:
    code = "import sys, flanctl.agent.kernel.addresses; print([m for m in ('pyroute2','socket','pathlib','subprocess') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
