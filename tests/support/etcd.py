"""Real etcd servers: Debian's 3.4 and a 3.7 built from tests/etcd-server, one or three members.

with Cluster("3.7", members=3, folder=tmp_path) as cluster:      # v2=True, tls=Tls(…) where a test wants them
    cluster.kill(cluster.leader())
    cluster.etcdctl("put", "/a", "1")

`python -m tests.support.etcd` builds the 3.7 server beforehand: about a minute, once, then it lies in .cache.
Everything listens on ephemeral ports; every process is ended by its pid and waited for.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from tests.support.deadline import until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Version = Literal["3.4", "3.7"]

START_SECONDS = 40.0
"""Shared, slow machines; a healthy cluster of three is up in 2 s."""


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files of a cluster that speaks TLS to its clients, one certificate and key for each member.

    `client` is the certificate etcdctl shows; with `client_auth` every client must show one that `ca` signed.
    """

    ca: Path
    members: tuple[tuple[Path, Path], ...]
    client: tuple[Path, Path]
    client_auth: bool = False


@dataclass(slots=True)
class _Member:
    name: str
    host: str
    client: int  # port
    peer: int  # port
    prefix: tuple[str, ...]
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    frozen: bool = False
    arguments: list[str] = field(default_factory=list)
    scheme: str = "http"

    @property
    def endpoint(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.client}"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C in pytest ends the tests, and these by their pid
            )

    def end(self) -> None:
        """SIGKILL, which reaches a frozen process too; data is for this test only."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process, self.frozen = None, False

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None, f"{self.name} does not run"
        os.kill(self.process.pid, number)
        self.frozen = number == signal.SIGSTOP


class Cluster:
    """One or three members. `host` is where clients and peers reach them, one for all or one each.

    `prefix` is put before each member's command (`nsenter --net=… --`; it must exec, so that the pid stays ours),
    one for all or one each. `extra` are more etcd options for every member.
    """

    def __init__(
        self,
        version: Version,
        members: int = 1,
        *,
        folder: Path,
        host: str | Sequence[str] = "127.0.0.1",
        prefix: Sequence[str] | Sequence[Sequence[str]] = (),
        v2: bool = False,
        tls: Tls | None = None,
        extra: Sequence[str] = (),
    ) -> None:
        assert not (v2 and version != "3.4"), "etcd 3.7 has no v2"
        self.version = version
        self.folder = folder
        self.user = ""
        """`NAME:PASSWORD` for etcdctl, once a test has turned logins on."""
        self._v2 = v2
        self._tls = tls
        self._extra = tuple(extra)
        hosts = [host] * members if isinstance(host, str) else list(host)
        prefixes = _each(prefix, members)
        assert len(hosts) == len(prefixes) == members
        folder.mkdir(parents=True, exist_ok=True)
        ports = _free_ports(2 * members)
        self._members = [
            _Member(f"etcd{i}", hosts[i], ports[2 * i], ports[2 * i + 1], prefixes[i], folder)
            for i in range(members)
        ]
        if tls is not None:
            for member in self._members:
                member.scheme = "https"

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(member.endpoint for member in self._members)

    def __enter__(self) -> Self:
        try:
            for member in self._members:
                shutil.rmtree(self.folder / member.name, ignore_errors=True)
                member.arguments = self._command(member)
                member.start()
            self.wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for member in self._members:
            member.end()
            shutil.rmtree(self.folder / member.name, ignore_errors=True)

    def kill(self, index: int) -> None:
        self._members[index].end()

    def wait_end(self, index: int, why: str) -> None:
        """Until a member has ended by itself, with these words in the last lines of its log."""
        member = self._members[index]
        assert member.process is not None
        try:
            member.process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{member.name} did not end") from None
        tail = member.log.read_text(errors="replace")[-4000:]
        assert why in tail, tail
        member.process = None

    def restart(self, *indexes: int) -> None:
        """Start again on the same data, after a kill or instead of one; returns when all that live are healthy."""
        for index in indexes:
            self._members[index].end()
            self._members[index].start()
        self.wait()

    def start_empty(self) -> None:
        """All members, ended before, begin anew without any data, as after the loss of every disk."""
        for member in self._members:
            assert member.process is None, f"{member.name} runs"
            shutil.rmtree(self.folder / member.name)
            member.start()
        self.wait()

    def remove(self, index: int) -> None:
        """Take a member out of the cluster and end it; its data are gone."""
        member = self._members[index]
        # Until all have been in touch for 5 s etcd refuses (--strict-reconfig-check).
        words = ("member", "remove", self.id(index))
        until(lambda: self._tries(*words), seconds=START_SECONDS, what=f"{member.name} is removed")
        member.end()
        shutil.rmtree(self.folder / member.name)

    def add(self, index: int, host: str) -> None:
        """A new member in place of a removed one, on another address; the ports stay, so that a name may mean both."""
        old = self._members[index]
        new = _Member(f"{old.name}n", host, old.client, old.peer, old.prefix, self.folder, scheme=old.scheme)
        self._members[index] = new
        words = ("member", "add", new.name, f"--peer-urls={_peer(new)}")
        until(lambda: self._tries(*words), seconds=START_SECONDS, what=f"{new.name} is added")
        new.arguments = self._command(new, state="existing")
        new.start()
        self.wait()

    def id(self, index: int) -> str:
        """A member's id as etcdctl takes it: `8e9e05c52164694d`."""
        name = self._members[index].name
        listed = (line.split(", ") for line in self.etcdctl("member", "list").splitlines())
        return next(fields[0] for fields in listed if fields[2] == name)

    def freeze(self, index: int) -> None:
        """A hung host: connections stay, nothing answers."""
        self._members[index].send(signal.SIGSTOP)

    def thaw(self, index: int) -> None:
        self._members[index].send(signal.SIGCONT)

    def pid(self, index: int) -> int:
        process = self._members[index].process
        assert process is not None
        return process.pid

    def leader(self) -> int:
        """The index of the member the living ones follow; waits for an election to end."""

        def look() -> int | None:
            for index, member in self._living():
                status = self._try(member, "endpoint", "status", "--write-out=json")
                if status is None:
                    continue
                answer = json.loads(status)[0]["Status"]
                if answer.get("leader", 0) == answer["header"]["member_id"]:
                    return index + 1
            return None

        found = until(look, seconds=START_SECONDS, what="the cluster has a leader")
        assert found is not None
        return found - 1

    def etcdctl(self, *arguments: str) -> str:
        """What etcdctl (v3) prints, asked through the living members."""
        return _output(self._through_living(arguments))

    @contextlib.contextmanager
    def etcdctl_running(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """One that goes on, such as `watch`: its stdout is a pipe, its end that of the block."""
        with subprocess.Popen(
            self._through_living(arguments),
            env=_etcdctl_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def wait(self) -> None:
        """Until every living member answers a read through consensus."""
        deadline = time.monotonic() + START_SECONDS
        for _, member in self._living():
            left = max(1.0, deadline - time.monotonic())
            until(functools.partial(self._healthy, member), seconds=left, what=f"{member.name} is healthy")

    def _healthy(self, member: _Member) -> bool:
        assert member.process is not None
        if (status := member.process.poll()) is not None:
            tail = member.log.read_text(errors="replace")[-2000:]
            raise AssertionError(f"{member.name} ended with {status}:\n{tail}")
        return self._try(member, "endpoint", "health") is not None

    def _living(self) -> list[tuple[int, _Member]]:
        return [(i, m) for i, m in enumerate(self._members) if m.process is not None and not m.frozen]

    def _tries(self, *arguments: str) -> bool:
        try:
            self.etcdctl(*arguments)
        except subprocess.CalledProcessError:
            return False
        return True

    def _through_living(self, arguments: Sequence[str]) -> list[str]:
        living = self._living()
        assert living, "no member lives"
        return self._etcdctl(living[0][1], *arguments, endpoints=[m.endpoint for _, m in living])

    def _try(self, member: _Member, *arguments: str) -> str | None:
        try:
            return _output(self._etcdctl(member, *arguments))
        except subprocess.CalledProcessError:
            return None

    def _etcdctl(self, member: _Member, *arguments: str, endpoints: Sequence[str] = ()) -> list[str]:
        where = ",".join(endpoints) or member.endpoint
        command = [*member.prefix, "etcdctl", f"--endpoints={where}", "--command-timeout=5s"]
        if self.user:
            command.append(f"--user={self.user}")
        if self._tls is not None:
            cert, key = self._tls.client
            command += [f"--cacert={self._tls.ca}", f"--cert={cert}", f"--key={key}"]
        return [*command, *arguments]

    def _command(self, member: _Member, *, state: str = "new") -> list[str]:
        client, peer = member.endpoint, _peer(member)
        peers = ",".join(f"{one.name}={_peer(one)}" for one in self._members)
        return [
            _binary(self.version),
            f"--name={member.name}",
            f"--data-dir={self.folder / member.name}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster={peers}",
            f"--initial-cluster-state={state}",
            "--logger=zap",
            "--log-outputs=stderr",
            "--unsafe-no-fsync",
            *(["--enable-v2"] if self._v2 else []),
            *self._secure(member),
            *self._extra,
        ]

    def _secure(self, member: _Member) -> list[str]:
        if self._tls is None:
            return []
        cert, key = self._tls.members[self._members.index(member)]
        words = [f"--cert-file={cert}", f"--key-file={key}"]
        if self._tls.client_auth:
            words += [f"--trusted-ca-file={self._tls.ca}", "--client-cert-auth"]
        return words


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(
            command,
            env=_etcdctl_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except subprocess.CalledProcessError as error:
        error.add_note(error.stderr)
        raise


def _etcdctl_environment() -> dict[str, str]:
    return {**os.environ, "ETCDCTL_API": "3"}


def _peer(member: _Member) -> str:
    host = f"[{member.host}]" if ":" in member.host else member.host
    return f"http://{host}:{member.peer}"


def _each(prefix: Sequence[str] | Sequence[Sequence[str]], members: int) -> list[tuple[str, ...]]:
    if all(isinstance(word, str) for word in prefix):
        return [tuple(str(word) for word in prefix)] * members
    return [tuple(one) for one in prefix]


def _free_ports(count: int) -> list[int]:
    """Ports nobody holds now, all held together while choosing so that they differ."""
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()


def _binary(version: Version) -> str:
    if version == "3.4":
        return "etcd"
    return os.environ.get("FLANCTL_ETCD37") or str(_built())


def _built() -> Path:
    """The 3.7 server, built into .cache once per state of its sources; several runs at once build it once."""
    root = _repository()
    sources = root / "tests" / "etcd-server"
    names = ("go.mod", "go.sum", "main.go")
    digest = hashlib.sha256(b"".join((sources / name).read_bytes() for name in names)).hexdigest()[:16]
    folder = root / ".cache" / f"etcd-{digest}"
    binary = folder / "etcd"
    if binary.exists():
        return binary
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not binary.exists():
            build = ["go", "build", "-trimpath", "-ldflags=-s -w", "-buildvcs=false", "-o"]
            new = folder / "etcd.new"
            done = subprocess.run(
                [*build, str(new), "."],
                cwd=sources,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"etcd 3.7 does not build:\n{done.stderr[-4000:]}"
            new.rename(binary)
    return binary


def _repository() -> Path:
    """The folder that holds pyproject.toml, from wherever pytest was started below it."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "tests" / "etcd-server" / "go.mod").exists():
            return folder
    raise AssertionError(f"{here} is not in the repository")


if __name__ == "__main__":
    print(_binary("3.7"))
