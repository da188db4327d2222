"""What every tier shares: capabilities (said first, skipped loudly, required in CI) and "nothing left behind"."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.support import capabilities
from tests.support.deadline import until

if TYPE_CHECKING:
    from collections.abc import Iterator

# A shared machine is slow for a second now and then; that says nothing about the inputs.
settings.register_profile("shared", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("shared")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        default="",
        metavar="CAPABILITY,…",
        help="capabilities whose absence is a failure, not a skip (`all`: every one but what only some kernels have)",
    )


def pytest_report_header(config: pytest.Config) -> list[str]:
    return ["capabilities: " + ", ".join(capabilities.summary())]


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = str(item.config.getoption("--require"))
    required = (
        set(capabilities.NAMES) - capabilities.OPTIONAL
        if wanted == "all"
        else set(filter(None, wanted.split(",")))
    )
    for mark in item.iter_markers("needs"):
        for name in mark.args:
            missing = capabilities.missing(name)
            if missing is None:
                continue
            if name in required:
                pytest.fail(f"required capability {name} is missing: {missing}", pytrace=False)
            pytest.skip(f"needs {name}: {missing}")


def _left_behind() -> dict[str, set[str]]:
    """What a test may create and must remove: children, namespaces, devices, descriptors."""
    me = Path("/proc/self")
    children = {
        f"{pid} {_command(pid)}"
        for task in (me / "task").iterdir()
        for pid in _read(task / "children").split()
    }
    descriptors: set[str] = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        # gRPC keeps its poller's descriptors for the life of the process; pytest's own capture files change.
        if target.startswith("socket:") or "/dev/net/tun" in target:
            descriptors.add(f"{fd} {target}")
    # A lab's namespaces bear the pid of its maker; those of another run on this machine are not ours to judge.
    other = re.compile(rf"flan-(?!{os.getpid()}-)\d+-")
    netns = (
        {name for name in os.listdir("/run/netns") if not other.match(name)}
        if Path("/run/netns").is_dir()
        else set()
    )
    return {
        "process": children,
        "namespace": netns,
        "device": set(os.listdir("/sys/class/net")),
        "descriptor": descriptors,
    }


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _command(pid: str) -> str:
    return _read(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").strip()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a process, namespace, device or socket behind."""
    before = _left_behind()
    yield

    def extra() -> dict[str, set[str]]:
        return {kind: left for kind, now in _left_behind().items() if (left := now - before[kind])}

    if extra():
        gc.collect()
        until(lambda: not extra(), seconds=3.0, fail=False)
    if left := extra():
        pytest.fail(f"left behind: {left}", pytrace=False)
