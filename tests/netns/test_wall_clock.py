"""The wall clock jumps under a running agent (NTP after a dead battery, an operator's date -s): leases do not care."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from flanctl.demo.hosts import Lab
from tests.support.agents import RunningAgent, flanctl
from tests.support.deadline import until
from tests.support.etcd import Cluster

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.needs("root", "netns", "tun", "iptables", "etcd34", "cc"),
    pytest.mark.timeout(180),
]

SUBNETS = "/jxdd/network/subnets/"
DAY = 86_400
SHIFTED = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* The wall clock and nothing else, by as many seconds as the file says. Python asks it by this function alone. */
int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real)
        real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(id, now);
    if (!failed && id == CLOCK_REALTIME) {
        long long by = 0;
        FILE *file = fopen(getenv("SHIFTED_BY"), "r");
        if (file) {
            if (fscanf(file, "%lld", &by) == 1)
                now->tv_sec += by;
            fclose(file);
        }
    }
    return failed;
}
"""


def test_a_jump_of_a_day_either_way_changes_no_lease(tmp_path: Path) -> None:
    library, shift = tmp_path / "shifted.so", tmp_path / "by"
    shift.write_text("0")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-xc", "-", "-o", str(library), "-ldl"],
        input=SHIFTED,
        text=True,
        check=True,
    )
    with Lab("clock") as lab:
        host, registry = lab.add_host(), lab.add_host("etcd")
        with Cluster(
            "3.4", folder=tmp_path / "etcd", host=str(registry.address), prefix=registry.command([])
        ) as etcd:
            endpoint = etcd.endpoints[0]
            flanctl(host, endpoint, "net", "init", "--network", "172.17.0.0/16")
            agent = RunningAgent.start(
                host, tmp_path / "agent", endpoint, "--iface", "eth0", "--lease-ttl", "12s",
                LD_PRELOAD=str(library), SHIFTED_BY=str(shift),
            ).wait()  # fmt: skip
            key = f"{SUBNETS}{str(agent.subnet).replace('/', '-')}"

            def renewals() -> int:
                return agent.log_text().count(" renewed ")

            def said_ahead(days: int) -> bool:
                """The agent's own log lines bear the shifted date: the jump is felt."""
                today = subprocess.run(
                    ["date", "-u", "-d", f"{days} days", "+%Y-%m-%dT"], capture_output=True, text=True, check=True
                )  # fmt: skip
                return today.stdout.strip() in agent.log_text()

            first = json.loads(etcd.etcdctl("get", key, "-w", "json"))["kvs"][0]
            for days in (1, -1):
                shift.write_text(str(days * DAY))
                before = renewals()
                until(lambda before=before: renewals() >= before + 2, seconds=30)
                assert said_ahead(days)
            now = json.loads(etcd.etcdctl("get", key, "-w", "json"))["kvs"][0]
            assert (now["create_revision"], now["lease"]) == (first["create_revision"], first["lease"])
            assert "lease lost" not in agent.log_text()
            assert "stands again" not in agent.log_text()

            # Started a day later by a wrong clock while etcd is away: what it knew seems to have ended, so it waits.
            etcd.kill(0)
            agent.kill()
            shift.write_text(str(DAY))
            again = agent.again()
            again.wait_log("waiting: ")
            assert "going on with what we knew" not in again.log_text()
            etcd.restart(0)
            again.wait()
            assert again.subnet == agent.subnet
            assert again.terminate() == 0
    assert lab.leftovers() == ()
