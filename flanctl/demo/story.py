"""The first minute: hosts on one machine, from an empty registry to packets between containers.

Each step prints the command an operator would type, and that command's real output; the first step that does not
hold ends the story. Nothing is left behind, unless `keep` says so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from ipaddress import IPv4Interface
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from flanctl.demo.hosts import Lab, refuse_unable
from flanctl.errors import FlanctlError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from flanctl.demo.hosts import Container, Host, Namespace

T = TypeVar("T")

NETWORK = "172.17.0.0/16"
PORT = 8285


def own_command() -> list[str]:
    """How to start this very program again: the frozen file, or the interpreter with our package."""
    if getattr(sys, "frozen", False) or getattr(sys, "oxidized", False):
        return [sys.executable]
    return [sys.executable, "-m", "flanctl"]


class StepFailedError(FlanctlError):
    """The demo's promise did not hold."""

    default_id = "demo-step"


@dataclass(slots=True)
class Member:
    """One host of the story with its agent and container."""

    host: Host
    folder: Path
    agent: subprocess.Popen[Any] | None = None
    container: Container | None = None
    subnet: str = ""

    @property
    def log(self) -> Path:
        return self.folder / "agent.log"

    @property
    def subnet_file(self) -> Path:
        return self.folder / "subnet.env"


@dataclass(slots=True)
class Story:
    """Tells and checks. `write` gets each line; colours only if `colour`."""

    write: Callable[[str], None]
    colour: bool = False
    steps: list[dict[str, object]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    agent: str = "agent --iface eth0"
    """What is typed on each host."""
    started: float = field(default_factory=time.monotonic)

    def step(self, title: str) -> None:
        self.steps.append({"step": title, "at_seconds": round(time.monotonic() - self.started, 2)})
        self.write("")
        self.write(self._paint("1;36", f"{len(self.steps)}. {title}"))

    def typed(self, where: Namespace, words: str) -> None:
        """The line an operator would type, behind that host's prompt."""
        self.write(self._paint("1", f"{where.name}# ") + words)

    def shown(self, text: str) -> None:
        for line in text.rstrip("\n").splitlines():
            self.write(f"  {line}")

    def holds(self, sentence: str) -> None:
        """Something was checked and is so."""
        self.write(self._paint("32", f"  ✓ {sentence}"))
        self.steps[-1].setdefault("holds", [])
        held = self.steps[-1]["holds"]
        if isinstance(held, list):
            held.append(sentence)

    def run(self, where: Namespace, words: str, *, extra: list[str] | None = None) -> str:
        """`flanctl WORDS` on a host: typed, run and shown. `extra` are words not worth showing."""
        self.typed(where, f"flanctl {words}")
        done = where.run([*own_command(), *words.split(), *(extra or [])], env=self.environment)
        self.shown(done.stdout + done.stderr)
        return done.stdout

    def tool(self, where: Namespace, words: str) -> str:
        """Another program than ours, the same way."""
        self.typed(where, words)
        done = where.run(words.split(), env=self.environment, check=False)
        self.shown(_last_lines(done.stdout + done.stderr, 3))
        if done.returncode != 0:
            raise StepFailedError(f"{where.name}: {words} ended with {done.returncode}")
        return done.stdout

    def _paint(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.colour else text


def run_demo(
    write: Callable[[str], None],
    *,
    hosts: int = 2,
    etcd: bool = False,
    data_path: str | None = None,
    keep: bool = False,
    colour: bool = False,
) -> list[dict[str, object]]:
    """Tell the story; the steps with what held. Raises FlanctlError at the first step that does not hold."""
    refuse_unable()
    if shutil.which("ping") is None:
        raise FlanctlError("the demo needs the program ping", hint="apt install iputils-ping")
    folder = Path(tempfile.mkdtemp(prefix="flanctl-demo-"))
    lab = None
    # An operator's kill or a closed terminal cleans up as Ctrl-C does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        lab = Lab("demo")
        story = Story(write, colour)
        if data_path is not None:
            story.agent += f" --data-path {data_path}"
        _tell(story, lab, folder, hosts, etcd=etcd)
        if keep:
            _farewell(story, lab, folder)
            lab = None
        return story.steps
    finally:
        if lab is not None:
            lab.close()
        if not keep or lab is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _tell(story: Story, lab: Lab, folder: Path, hosts: int, *, etcd: bool) -> None:
    endpoint = _registry(lab, folder, etcd=etcd)
    story.environment = {
        **{name: text for name, text in os.environ.items() if not name.startswith(("FLANCTL_", "FLANNEL"))},
        "FLANCTL_ENDPOINTS": endpoint,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    members = [_member(lab, folder) for _ in range(hosts)]
    one, two = members[0], members[1]

    story.step(f"The network's config, written once ({endpoint.partition(':')[0]} is the registry)")
    story.run(one.host, f"net init --network {NETWORK}")

    story.step("An agent on each host takes a subnet")
    for member in members:
        _start_agent(story, member)

    story.step("Who has what")
    listed = story.run(one.host, "subnets ls")
    _expect(
        story, all(member.subnet in listed for member in members), f"{hosts} hosts, {hosts} different subnets"
    )

    story.step("What dockerd is told, and a container on each host's docker0 as dockerd would make it")
    for member in members:
        _add_container(story, member, show=member is one)

    story.step("Packets between containers of different hosts")
    _ping(story, one, two)
    rate = _transfer(story, one, two)
    story.steps[-1]["gbit_per_second"] = rate
    _path_in_use(story, one)

    story.step("A third host joins; nobody is told by hand")
    three = _member(lab, folder)
    _start_agent(story, three)
    _add_container(story, three, show=False)
    _ping(story, one, three)

    story.step(f"The agent of {two.host.name} is killed and comes back, other hosts' packets go on")
    _kill_and_return(story, one, two, three)

    story.step("A stranger sends a forged packet")
    _forge(story, lab, one, two)


def _registry(lab: Lab, folder: Path, *, etcd: bool) -> str:
    """Where the registry is; starts a real etcd on the switch if asked for."""
    if not etcd:
        return f"sqlite:{folder / 'registry.db'}"
    if shutil.which("etcd") is None:
        raise FlanctlError("--etcd needs the program etcd", hint="apt install etcd-server")
    url = f"http://{lab.network.network_address + 1}:2379"
    with (folder / "etcd.log").open("wb") as log:
        lab.underlay.popen(
            [
                "etcd", "--data-dir", str(folder / "etcd"), "--listen-client-urls", url, "--advertise-client-urls", url,
                "--listen-peer-urls", "http://127.0.0.1:2380",
            ],
            stdout=log,
            stderr=log,
        )  # fmt: skip
    _wait(
        lambda: b"ready to serve client requests" in (folder / "etcd.log").read_bytes(),
        15,
        "etcd did not start",
    )
    return url


def _member(lab: Lab, folder: Path) -> Member:
    host = lab.add_host()
    own = folder / host.name
    own.mkdir()
    return Member(host, own)


def _start_agent(story: Story, member: Member) -> None:
    words = story.agent
    story.typed(member.host, f"flanctl {words} &")
    before = member.log.stat().st_size if member.log.exists() else 0
    with member.log.open("ab") as log:
        # A name of its own, so that the list of leases tells the hosts apart as it would on real ones.
        member.agent = member.host.popen(
            [
                "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', member.host.name, *own_command(), *words.split(), "--subnet-file", str(member.subnet_file),
                "--state-dir", str(member.folder / "state"), "--run-dir", str(member.folder / "run"),
            ],
            env=story.environment,
            stdout=log,
            stderr=log,
        )  # fmt: skip
    agent = member.agent

    def ready() -> re.Match[str] | None:
        text = member.log.read_bytes()[before:].decode(errors="replace")
        if agent.poll() is not None:
            story.shown(_last_lines(text, 10))
            raise StepFailedError(f"the agent of {member.host.name} ended with {agent.returncode}")
        return re.search(r"ready +(network=.*)", text)

    found = _wait(ready, 20, f"the agent of {member.host.name} was not ready in 20 s")
    story.shown(f"ready {found[1]}")
    member.subnet = re.search(r"subnet=(\S+)", found[1])[1]  # type: ignore[index]  # the ready line always has it


def _add_container(story: Story, member: Member, *, show: bool) -> None:
    words = f"docker-opts -c -f {member.subnet_file} -d -"
    if show:
        story.typed(member.host, "flanctl docker-opts -c -d -")
    done = member.host.run([*own_command(), *words.split()], env=story.environment)
    if show:
        story.shown(done.stdout)
    bip, mtu = re.search(r"--bip=(\S+)", done.stdout), re.search(r"--mtu=(\d+)", done.stdout)
    if bip is None or mtu is None:
        raise StepFailedError(f"docker-opts printed neither --bip nor --mtu: {done.stdout.strip()}")
    member.container = member.host.add_container(IPv4Interface(bip[1]), int(mtu[1]))


def _ping(story: Story, one: Member, other: Member) -> None:
    if one.container is None or other.container is None:
        raise StepFailedError("no container to ping")
    story.tool(one.container, f"ping -c 3 -i 0.2 -W 2 {other.container.address}")
    story.holds(f"{one.container.name} reaches {other.container.name} on {other.host.name}")


def _transfer(story: Story, one: Member, other: Member) -> float:
    """One TCP stream for two seconds, compared by hash; Gbit/s."""
    sink, source = one.container, other.container
    if sink is None or source is None:
        raise StepFailedError("no container to send to")
    transfer = [*own_command(), "demo-transfer"]
    receiver = sink.popen(
        [*transfer, "serve", str(sink.address), "5001"], stdout=subprocess.PIPE, env=story.environment
    )
    assert receiver.stdout is not None
    if receiver.stdout.readline() != b"listening\n":
        raise StepFailedError("the receiver did not start")
    sent = source.run(
        [*transfer, "send", str(sink.address), "5001", "2"], env=story.environment
    ).stdout.split()
    got = receiver.stdout.read().decode().split()
    if len(got) != 3 or sent != [got[0], got[2]]:
        raise StepFailedError("what arrived over TCP is not what was sent")
    rate = int(got[0]) * 8 / float(got[1]) / 1e9
    story.holds(
        f"TCP {source.name} → {sink.name}: {int(got[0]) / 1e6:.0f} MB in {float(got[1]):.1f} s, "
        f"{rate:.2f} Gbit/s, SHA-256 equal"
    )
    return round(rate, 2)


def _path_in_use(story: Story, member: Member) -> None:
    """What the agent says of its path, and that the packets took it."""
    status = [
        *own_command(),
        "status",
        "--run-dir",
        str(member.folder / "run"),
        "--subnet-file",
        str(member.subnet_file),
    ]
    story.typed(member.host, "flanctl status | grep packets")
    said = member.host.run(status, env=story.environment, check=False).stdout
    story.shown("\n".join(line for line in said.splitlines() if "packets out" in line))
    answer = member.host.run([*status, "-w", "json"], env=story.environment, check=False).stdout
    known = json.loads(answer)
    counters, path = known["counters"], known["data_path"]
    kernels = counters.get("kernel_in_packets", 0)
    took = kernels if path == "kernel" else counters["in_packets"] - kernels
    story.steps[-1]["data_path"] = path
    _expect(
        story,
        took * 2 > counters["in_packets"],
        f"{took} of {counters['in_packets']} packets came in by the path in use, {path}",
    )


def _kill_and_return(story: Story, one: Member, two: Member, three: Member) -> None:
    if one.container is None or two.container is None or three.container is None or two.agent is None:
        raise StepFailedError("hosts are missing")
    had = two.subnet
    words = f"ping -i 0.05 -c 60 -W 2 {three.container.address}"
    story.typed(one.container, f"{words} &")
    pings = one.container.popen(words.split(), stdout=subprocess.PIPE, env=story.environment)
    story.typed(two.host, f"kill -KILL {two.agent.pid}")
    two.agent.send_signal(signal.SIGKILL)
    two.agent.wait()
    gone = time.monotonic()
    _start_agent(story, two)
    back = time.monotonic() - gone
    _expect(story, two.subnet == had, f"{two.host.name} is back after {back:.1f} s with its subnet {had}")
    said = pings.communicate(timeout=30)[0].decode()
    answered = re.search(r"(\d+) packets transmitted, (\d+) received", said)
    story.shown(_last_lines(said, 2))
    if answered is None or answered[1] != answered[2]:
        raise StepFailedError(f"packets between {one.host.name} and {three.host.name} were lost")
    story.holds(f"{one.host.name} ↔ {three.host.name}: {answered[2]} of {answered[1]} answered meanwhile")
    _ping(story, one, two)


def _forge(story: Story, lab: Lab, one: Member, two: Member) -> None:
    if one.container is None or two.container is None or one.agent is None:
        raise StepFailedError("hosts are missing")
    stranger = lab.add_host("stranger")
    story.typed(
        stranger,
        f"(a ping that claims to come from {two.container.address}, in a datagram to {one.host.name})",
    )
    stranger.run(
        [
            *own_command(), "demo-transfer", "forge", str(one.host.address), str(PORT), str(two.container.address),
            str(one.container.address),
        ],
        env=story.environment,
    )  # fmt: skip
    story.typed(one.host, f"kill -USR1 {one.agent.pid}    # the agent logs its counters")

    def counted() -> re.Match[str] | None:
        agent = one.agent
        if agent is not None:
            agent.send_signal(signal.SIGUSR1)
        lines = [
            line for line in one.log.read_text(errors="replace").splitlines() if "info  counters " in line
        ]
        found = re.search(r"counters .*", lines[-1]) if lines else None
        return found if found and re.search(r"drop-(unknown-sender|spoofed-source)=[1-9]", found[0]) else None

    found = _wait(counted, 10, "the forged packet was not counted")
    story.shown(found[0])
    story.holds("refused and counted; it reached no container")


def _farewell(story: Story, lab: Lab, folder: Path) -> None:
    first = lab.hosts[0]
    removal = lab.keep()
    story.write("")
    story.write(f"Kept. Enter a host:  nsenter --net={first.path}")
    for name in ("FLANCTL_ENDPOINTS",):
        story.write(f"There:               export {name}={story.environment[name]}")
    story.write(f"Remove it all:       {removal}; rm -r {folder}")


def _expect(story: Story, holds: bool, sentence: str) -> None:
    if not holds:
        raise StepFailedError(f"not so: {sentence}")
    story.holds(sentence)


def _wait(condition: Callable[[], T | None], seconds: float, otherwise: str) -> T:
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise StepFailedError(otherwise)
        time.sleep(0.02)
    return answer


def _last_lines(text: str, count: int) -> str:
    return "\n".join([line for line in text.strip().splitlines() if line.strip()][-count:])
