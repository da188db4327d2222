"""What the other tests here stand on: a machine boots, obeys, forgets /run, and leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from flanctl.demo.hosts import Lab
from tests.support.systemd_machine import Machine
from tests.systemd.conftest import NEEDS

pytestmark = [pytest.mark.needs(*NEEDS), pytest.mark.timeout(200)]


def test_a_machine_boots_keeps_its_files_over_a_reboot_and_leaves_nothing(tree, tmp_path):
    with Lab("boot") as lab:
        host = lab.add_host()
        with Machine(host, tree, tmp_path / "m") as machine:
            machine.write("etc/told", "before")
            machine.boot()
            assert machine.ok("cat", "/proc/1/comm") == "systemd\n"
            assert machine.ok("hostname") == "h1\n"
            assert machine.run("systemctl", "--failed", "--quiet").out == ""
            assert "192.168.66.11/24" in machine.ok("ip", "address", "show", "eth0")
            assert machine.text("etc/told") == "before"
            machine.write("run/gone", "")
            machine.write("etc/kept", "after")
            machine.power_off()
            machine.boot()
            assert machine.text("etc/kept") == "after"
            assert not (machine / "run/gone").exists()
        groups = list(Path("/sys/fs/cgroup").rglob(f"*{host.namespace}*"))
    assert groups == []
    assert lab.leftovers() == ()
    assert "overlay" not in Path("/proc/self/mounts").read_text()
    assert not any(Path(folder, "etc/told").exists() for folder in tree.split(":"))
