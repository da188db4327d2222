"""An agent may be stopped or killed at every step of its start; the next start makes it good. See stages.py."""

from __future__ import annotations

import json
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from flanctl.demo.hosts import Lab
from tests.netns.stages import NOT_REACHED
from tests.support.agents import environment

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.needs("root", "netns", "tun", "iptables")
FILES = ["run", "run/agent.lock", "state", "state/known.json", "state/state.json", "subnet.env"]


@pytest.mark.parametrize(
    ("number", "stride"), [(signal.SIGTERM, 3), (signal.SIGKILL, 1)], ids=["SIGTERM", "SIGKILL"]
)
def test_after_a_start_that_ends_at_any_step_the_next_takes_the_same_subnet_and_nothing_is_leaked(
    tmp_path: Path, number: signal.Signals, stride: int
) -> None:
    """A stop is only noted and takes effect a few steps later, so that every third step is enough for it."""
    with Lab("stages") as lab:
        host = lab.add_host()
        done = host.run(
            [sys.executable, "-m", "tests.netns.stages", str(tmp_path), str(int(number)), str(stride)],
            env=environment(PYTHONPATH=":".join(filter(None, sys.path))),
            timeout=100,
        )
    trials = [json.loads(line) for line in done.stdout.splitlines()]
    steps = {trial["step"] for trial in trials}
    if stride == 1:
        assert steps >= {
            "flock",
            "create",
            "keep_tun",
            "add_address",
            "DataPlane",
            "add_route",
            "run",
            "replace_file",
        }
        assert steps >= {"fsync", "rename", "ready"}
    for trial in trials:
        what = json.dumps(trial, indent=1)
        ends = {-int(number)} if number is signal.SIGKILL else {0}
        assert trial["first"] in (ends if trial is not trials[-1] else {NOT_REACHED}), what
        assert trial["second"] == 0, what
        # What the first wrote, the second has; and there is one.
        assert len(trial["between"]["leases"]) <= 1, what
        assert len(trial["after"]["leases"]) == 1, what
        assert set(trial["between"]["leases"]) <= set(trial["after"]["leases"]), what
        assert trial["after"]["files"] == FILES, what
        assert trial["after"]["devices"] == ["eth0", "flannel0", "lo"], what
        assert "Traceback" not in trial["said"] + trial["said_then"], what
