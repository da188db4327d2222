"""Opening a TUN where there is none to open: each failure says what and what to try."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from flanctl.agent.kernel.tun import holders, open_tun
from flanctl.errors import FlanctlError, Invalid

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "name", ["", "a" * 16, "flannel 0", "flannel/0", "flannel%d", ".", "..", "ä" * 8, "a\tb"]
)
def test_a_name_no_interface_can_have_is_invalid(name: str) -> None:
    with pytest.raises(Invalid, match="cannot be the name of an interface"):
        open_tun(name)


def test_no_tun_device_names_the_file_and_the_cure(tmp_path: Path) -> None:
    with pytest.raises(FlanctlError, match="for flannel0: No such file or directory") as error:
        open_tun("flannel0", device=str(tmp_path / "tun"))
    assert error.value.id == "no-tun"
    assert "modprobe tun" in (error.value.hint or "")


def test_a_file_that_is_no_tun_is_refused_and_closed(tmp_path: Path) -> None:
    (tmp_path / "tun").write_bytes(b"")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FlanctlError, match="cannot make flannel0: Inappropriate ioctl"):
        open_tun("flannel0", device=str(tmp_path / "tun"))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.needs("root")
@pytest.mark.skipif(not os.path.exists("/usr/bin/setpriv"), reason="no setpriv to drop the capability with")
def test_without_cap_net_admin_the_capability_is_named() -> None:
    code = "from flanctl.agent.kernel.tun import open_tun\ntry: open_tun('flannel0')\nexcept Exception as e: print(type(e).__name__, e, '|', e.hint)"
    command = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == (
        "NotPermitted cannot make or attach to flannel0: Operation not permitted | run as root, or with CAP_NET_ADMIN\n"
    )


def test_a_holder_is_found_by_what_the_kernel_says_of_its_descriptor(tmp_path: Path) -> None:
    def process(pid: int, namespace: str, device: str, name: str) -> None:
        folder = tmp_path / str(pid)
        for part in ("ns", "fd", "fdinfo"):
            (folder / part).mkdir(parents=True)
        (folder / "ns/net").symlink_to(namespace)
        (folder / "fd/7").symlink_to(device)
        (folder / "fdinfo/7").write_text(f"pos:\t0\nflags:\t0104002\niff:\t{name}\n")
        (folder / "comm").write_text("flanneld\n")

    (tmp_path / "thread-self/ns").mkdir(parents=True)
    (tmp_path / "thread-self/ns/net").symlink_to("net:[1]")
    process(4711, "net:[1]", "/dev/net/tun", "flannel0")
    process(4712, "net:[2]", "/dev/net/tun", "flannel0")
    process(4713, "net:[1]", "/dev/net/tun", "flannel01")
    process(4714, "net:[1]", "/dev/null", "flannel0")
    process(os.getpid(), "net:[1]", "/dev/net/tun", "flannel0")
    assert holders("flannel0", proc=tmp_path) == ("flanneld (pid 4711)",)
