"""The frozen agent under what flanctl-agent.service takes away: capabilities, new privileges, a writable system.

The machine that tests has no systemd to ask, so its directives are made by hand from the unit's own lines: the capability
bounding set and no-new-privileges by setpriv(1), ProtectSystem=strict by a read-only root in a mount namespace,
MemoryDenyWriteExecute= by PR_SET_MDWE. The device policy, address families and system calls are not imitated.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from flanctl.demo.hosts import Lab
from tests.support.agents import environment, flanctl
from tests.support.capabilities import frozen_executable
from tests.support.deadline import until
from tests.support.frozen import NO_WX

pytestmark = pytest.mark.needs("frozen", "root", "netns", "tun", "iptables")

UNIT = Path("packaging/systemd/flanctl-agent.service")
# $0: the one folder that stays writable, as ReadWritePaths= and StateDirectory= make some; the rest is the command.
_CONFINE = """
set -e
mount --bind "$0" "$0"
mount -o remount,bind,ro /
mount -t tmpfs tmpfs /run
exec setpriv --no-new-privs --inh-caps=-all --bounding-set="$CAPABILITIES" "$@"
"""


def _directive(name):
    return re.search(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)[1]


def test_the_confined_agent_becomes_ready_and_stops(tmp_path):
    kept = [word.removeprefix("CAP_").lower() for word in _directive("CapabilityBoundingSet").split()]
    endpoints = f"sqlite:{tmp_path}/registry.db"
    log = tmp_path / "log"
    with Lab("unit") as lab:
        host = lab.add_host()
        flanctl(host, endpoints, "net", "init", "--network", "172.17.0.0/16")
        words = [
            "unshare", "--mount", "--propagation", "private", "sh", "-c", _CONFINE, str(tmp_path),
            *NO_WX, str(frozen_executable()), "agent", "--subnet-file", str(tmp_path / "subnet.env"),
            "--state-dir", str(tmp_path / "state"), "--run-dir", str(tmp_path / "run"),
        ]  # fmt: skip
        with log.open("wb") as stream:
            process = host.popen(
                words,
                env=environment(endpoints, CAPABILITIES=",".join(["-all", *(f"+{name}" for name in kept)])),
                stdout=stream,
                stderr=stream,
            )

        def settled() -> bool:
            return " ready " in log.read_text() or process.poll() is not None

        until(settled, seconds=40, fail=False)
        assert " ready " in log.read_text(), log.read_text()
        effective = re.search(
            r"^CapBnd:\s*(\w+)$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE
        )
        assert int(effective[1], 16).bit_count() == len(kept)
        assert "FORWARD" in host.run(["iptables-save"]).stdout
        assert "172.17.0.0/16" in host.run(["ip", "route"]).stdout
        process.terminate()
        assert process.wait(10) == 0, log.read_text()
    assert lab.leftovers() == ()
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
