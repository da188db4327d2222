"""What stands in an etcd, asked by plain HTTP and nothing of flanctl's: both of its key spaces, from a lab's namespace.

keys = Keys(lab.underlay.path, cluster.endpoints[0], v2=True)
keys.put("/jxdd/network/config", '{"Network":"172.17.0.0/16"}')
keys.leases()        # {"172.17.41.0/24": '{"PublicIP":"192.168.66.11"}'}
keys.ttl("/jxdd/network/subnets/172.17.41.0-24")
"""

from __future__ import annotations

import base64
import http.client
import json
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from tests.support.namespaces import inside

if TYPE_CHECKING:
    from pathlib import Path


class Keys:
    """One of an etcd's two key spaces. `where` is a network namespace; None for this one."""

    def __init__(self, where: Path | None, endpoint: str, *, v2: bool) -> None:
        self._where = where
        self._address = endpoint.removeprefix("http://")
        self._v2 = v2

    def put(self, key: str, value: str, *, ttl: int | None = None) -> None:
        if self._v2:
            form = {"value": value} | ({} if ttl is None else {"ttl": str(ttl)})
            self._ask("PUT", "/v2/keys" + quote(key), urlencode(form))
            return
        lease = {} if ttl is None else {"lease": self._v3("lease/grant", TTL=str(ttl))["ID"]}
        self._v3("kv/put", key=_b64(key), value=_b64(value), **lease)

    def delete(self, key: str) -> None:
        if self._v2:
            self._ask("DELETE", "/v2/keys" + quote(key))
        else:
            self._v3("kv/deleterange", key=_b64(key))

    def all(self, prefix: str = "/jxdd/network/") -> dict[str, str]:
        return {key: value for key, (value, _) in self._list(prefix).items()}

    def get(self, key: str) -> str | None:
        return self.all(key).get(key)

    def leases(self, prefix: str = "/jxdd/network/") -> dict[str, str]:
        """By subnet."""
        folder = f"{prefix}subnets/"
        return {key.removeprefix(folder).replace("-", "/"): value for key, value in self.all(folder).items()}

    def ttl(self, key: str) -> int | None:
        """Seconds left; None without an end."""
        return self._list(key)[key][1]

    def _list(self, prefix: str) -> dict[str, tuple[str, int | None]]:
        if self._v2:
            said = self._ask("GET", f"/v2/keys{quote(prefix.rstrip('/'))}?recursive=true&quorum=true")
            return dict(_files(said.get("node", {})))
        kvs = self._v3("kv/range", key=_b64(prefix), range_end=_b64(prefix[:-1] + chr(ord(prefix[-1]) + 1)))
        return {_text(kv["key"]): (_text(kv.get("value", "")), self._left(kv)) for kv in kvs.get("kvs", [])}

    def _left(self, kv: dict[str, Any]) -> int | None:
        if not int(kv.get("lease", 0)):
            return None
        return int(self._v3("lease/timetolive", ID=kv["lease"]).get("TTL", -1))

    def _v3(self, what: str, **wanted: object) -> Any:
        return self._ask("POST", f"/v3/{what}", json.dumps(wanted))

    def _ask(self, method: str, path: str, body: str | None = None) -> Any:
        headers = {"Content-Type": "application/x-www-form-urlencoded"} if method == "PUT" else {}
        with (
            inside(self._where) if self._where else nullcontext(),
            closing(http.client.HTTPConnection(self._address, timeout=10)) as link,
        ):
            link.request(method, path, body, headers)
            answer = link.getresponse()
            said = json.loads(answer.read())
            assert answer.status in {200, 201, 404}, said
            return said


def _files(node: dict[str, Any]) -> list[tuple[str, tuple[str, int | None]]]:
    if "value" in node:
        return [(node["key"], (node["value"], node.get("ttl")))]
    return [found for one in node.get("nodes", []) for found in _files(one)]


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _text(coded: str) -> str:
    return base64.b64decode(coded).decode()
