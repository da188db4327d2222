"""What etcd itself says of a network: what a drill is judged by, and nothing of flanctl's is asked for it.

truth = V3Truth(cluster)                 # by etcdctl; V2Truth(cluster, host) where agents live on etcd v2
truth.follow(revision)                   # from here on
last = truth.mark()                      # a key that says where a count ends
truth.happened(revision, last)           # every change between the two
truth.state()                            # what is there now
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from base64 import b64decode
from typing import TYPE_CHECKING, Any, Protocol

from tests.support.deadline import until
from tests.support.namespaces import inside

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flanctl.demo.hosts import Host
    from tests.support.etcd import Cluster

PREFIX = "/jxdd/network"
FOLDER = f"{PREFIX}/subnets/"
MARKER = f"{FOLDER}172.17.255.0-24"
"""A key that says where a count ends. No agent and no writer takes it."""
MARK = "10.98.0.1"
"""Its public IP."""

Happened = tuple[int, str, str]
"""Revision, key, public IP: of what was put there, or of what was deleted."""


class Truth(Protocol):
    """One API's way of asking."""

    def follow(self, after: int) -> None:
        """History begins here; what was before may be forgotten."""

    def mark(self) -> int:
        """Put MARKER; the revision of that."""

    def unmark(self) -> int:
        """Delete MARKER; the revision of that. A full etcd takes deletions."""

    def happened(self, after: int, last: int) -> list[Happened]:
        """All changes of subnets after a revision up to another, at which something happened to MARKER."""

    def state(self) -> dict[str, str]:
        """Public IP by key, now."""

    def forget(self) -> None:
        """Have etcd forget all history up to now."""

    def close(self) -> None: ...


class V3Truth:
    """By etcdctl, which is not ours: its watch reads etcd's history."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def follow(self, after: int) -> None: ...

    def close(self) -> None: ...

    def mark(self) -> int:
        return self._revision("put", MARKER, json.dumps({"PublicIP": MARK}))

    def unmark(self) -> int:
        return self._revision("del", MARKER)

    def forget(self) -> None:
        self._cluster.etcdctl("compact", str(self._revision("get", MARKER)))

    def _revision(self, *words: str) -> int:
        return int(json.loads(self._cluster.etcdctl(*words, "-w", "json"))["header"]["revision"])

    def state(self, at: int = 0) -> dict[str, str]:
        answer = json.loads(self._cluster.etcdctl("get", "--prefix", FOLDER, f"--rev={at}", "-w", "json"))
        return {
            b64decode(kv["key"]).decode(): _public_ip(b64decode(kv["value"]))
            for kv in answer.get("kvs") or ()
        }

    def happened(self, after: int, last: int) -> list[Happened]:
        owner = self.state(after)  # a deletion does not tell whose it was
        found: list[Happened] = []
        reached, deadline = after, time.monotonic() + 60.0
        while reached < last:
            assert time.monotonic() < deadline, f"etcd's history ends at {reached}, before {last}"
            command = ("watch", "--prefix", FOLDER, f"--rev={reached + 1}", "-w", "json")
            with self._cluster.etcdctl_running(*command) as process:
                assert process.stdout is not None
                while reached < last and (line := process.stdout.readline()):  # a member may end a watch
                    answer = json.loads(line)
                    assert not answer.get("CompactRevision"), "etcd has forgotten its history"
                    for event in answer.get("Events") or ():
                        key = b64decode(event["kv"]["key"]).decode()
                        reached = int(event["kv"]["mod_revision"])
                        if event.get("type"):
                            whose = owner.pop(key)
                        else:
                            whose = owner[key] = _public_ip(b64decode(event["kv"]["value"]))
                        found.append((reached, key, whose))
        return found


class V2Truth:
    """etcd v2 keeps 1000 events, so a thread reads each while it is there, one by one by its index."""

    def __init__(self, cluster: Cluster, host: Host) -> None:
        self._cluster = cluster
        self._host = host
        self._reader: _V2Reader | None = None

    def follow(self, after: int) -> None:
        self.close()
        self._reader = _V2Reader(self._cluster, self._host, after)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.stop()
            self._reader = None

    def mark(self) -> int:
        return _index(self._ask("PUT", MARKER, f'value={{"PublicIP":"{MARK}"}}'))

    def unmark(self) -> int:
        return _index(self._ask("DELETE", MARKER))

    def state(self) -> dict[str, str]:
        answer = self._ask("GET", f"{FOLDER}?recursive=true&quorum=true")
        nodes = answer.get("node", {}).get("nodes") or ()
        return {node["key"]: _public_ip(node["value"]) for node in nodes}

    def happened(self, after: int, last: int) -> list[Happened]:
        reader = self._reader
        assert reader is not None
        until(lambda: reader.reached >= last or reader.error, seconds=60, what="etcd's history is read")
        assert reader.error is None, reader.error
        return [one for one in list(reader.found) if after < one[0] <= last]

    def forget(self) -> None:
        for _ in range(1001):
            self._ask("PUT", "/elsewhere", "value=")

    def _ask(self, method: str, path: str, form: str = "") -> dict[str, Any]:
        with inside(self._host.path):
            for endpoint in self._cluster.endpoints:
                with contextlib.suppress(OSError, http.client.HTTPException), _Link(endpoint) as link:
                    answer = link.ask(method, path, form)
                    if "node" in answer or answer.get("errorCode") == 100:  # no such key or folder
                        return answer
            raise AssertionError(f"no member answers {method} {path}")


class _V2Reader:
    """Every event after an index, from whichever member answers."""

    def __init__(self, cluster: Cluster, host: Host, after: int) -> None:
        self.reached = after
        self.found: list[Happened] = []
        self.error: BaseException | str | None = None
        self._endpoints = cluster.endpoints
        self._host = host
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with inside(self._host.path):
                while not self._stop.wait(0.05):
                    for endpoint in self._endpoints:
                        # Nobody there, or nothing new for so long: the next one may know more.
                        with contextlib.suppress(OSError, http.client.HTTPException), _Link(endpoint) as link:
                            while not self._stop.is_set() and self._one(link):
                                pass
        except BaseException as error:
            self.error = error

    def _one(self, link: _Link) -> bool:
        answer = link.ask("GET", f"{FOLDER}?wait=true&recursive=true&waitIndex={self.reached + 1}")
        if answer.get("errorCode") == 401:
            self.error = f"etcd has forgotten its history after {self.reached}"
            self._stop.set()
        if "node" not in answer:  # an election
            return False
        node = answer["node"]
        put = answer["action"] not in {"delete", "expire", "compareAndDelete"}
        whose = _public_ip((node if put else answer["prevNode"])["value"])
        self.reached = _index(answer)
        self.found.append((self.reached, node["key"], whose))
        return True


class _Link:
    """A connection to one member's v2 API; gives up after 2 s of silence."""

    def __init__(self, endpoint: str) -> None:
        self._http = http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=2)

    def __enter__(self) -> _Link:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def ask(self, method: str, path: str, form: str = "") -> dict[str, Any]:
        head = {"Content-Type": "application/x-www-form-urlencoded"} if form else {}
        self._http.request(method, f"/v2/keys{path}", form, head)
        answer: dict[str, Any] = json.loads(self._http.getresponse().read() or "{}")
        return answer


def _index(answer: Mapping[str, Any]) -> int:
    return int(answer["node"]["modifiedIndex"])


def _public_ip(value: bytes | str) -> str:
    return str(json.loads(value)["PublicIP"])
