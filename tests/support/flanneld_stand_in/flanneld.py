"""A stand-in for flanneld's udp backend, 0.7.1 on etcd v2 or 0.28.9 on etcd v3: a program of its own, none of flanctl in it.

    python flanneld.py --like 0.7.1 -etcd-endpoints=http://192.168.66.1:2379 -etcd-prefix=/jxdd/network -iface=eth0
    python flanneld.py --static 172.17.41.0/24 --peer 172.17.42.0/24=192.168.66.12 -iface=eth0     (no registry)

It does what flanneld is known to do (flannel's facts, sections 3.3 to 3.8, 4.1 and 5.2), its faults included, where
another host of the network can see it: keys and values, unconditional renewal, reservations, watches, the previous
subnet, subnet.env, the device, the packets. Left out: other backends, --ip-masq's rules, TLS, several networks.
What the real one has not: `--like`, `--static`, `--peer`, `--ttl SECONDS`, `--proxy FILE` (proxy.c, compiled).
Python's standard library and ip(8) only.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import http.client
import json
import os
import queue
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from ipaddress import IPv4Address, IPv4Network
from urllib.parse import quote, urlencode, urlsplit

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
SUBNET_TTL = 86400
FREE_ONES = 100
EVERYTHING = IPv4Network("0.0.0.0/0")
LEASE_KEY = re.compile(r"(\d+\.\d+\.\d+\.\d+)-(\d+)")


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Lease:
    """One subnet, whom it belongs to, and when it ends (wall clock; 0 for a reservation)."""

    def __init__(self, subnet: IPv4Network, public_ip: str, expiration: float) -> None:
        self.subnet = subnet
        self.public_ip = public_ip
        self.expiration = expiration


def read_lease(key: str, value: str | None, expiration: float) -> Lease | None:
    found = LEASE_KEY.search(key)
    if found is None:
        return None
    subnet = IPv4Network(f"{found[1]}/{int(found[2])}", strict=False)
    public_ip = "0.0.0.0"
    if value is not None:
        try:
            said = {name.lower(): text for name, text in json.loads(value).items()}
            public_ip = said.get("publicip", public_ip)
        except (ValueError, AttributeError):
            return None
    return Lease(subnet, public_ip, expiration)


class Refused(Exception):
    """etcd's answer is an error."""

    def __init__(self, status: int, code: object, text: str) -> None:
        super().__init__(f"{status} {text}")
        self.code = code


class Etcd:
    """One request at a time, any endpoint that answers."""

    def __init__(self, endpoints: str) -> None:
        self.endpoints = [urlsplit(one).netloc for one in endpoints.split(",")]

    def open(self, method: str, path: str, body: str | None, headers: dict[str, str], timeout: float | None):
        problem: Exception | None = None
        for endpoint in random.sample(self.endpoints, len(self.endpoints)):
            link = http.client.HTTPConnection(endpoint, timeout=timeout)
            try:
                link.request(method, path, body, headers)
                return link, link.getresponse()
            except OSError as error:
                link.close()
                problem = error
        raise OSError(f"no endpoint answers: {problem}")

    def ask(self, method: str, path: str, body: str | None = None, headers: dict[str, str] | None = None):
        link, answer = self.open(method, path, body, headers or {}, 5.0)
        try:
            said = json.loads(answer.read() or b"{}")
            if answer.status >= 400:
                code = said.get("errorCode", said.get("code"))
                raise Refused(answer.status, code, str(said.get("message", said)))
            return said, answer.headers
        finally:
            link.close()


class V2:
    """The calls of 0.7.1."""

    def __init__(self, endpoints: str, prefix: str, ttl: int) -> None:
        self.etcd = Etcd(endpoints)
        self.root = "/v2/keys/" + "/".join(part for part in prefix.split("/") if part)
        self.ttl = ttl

    def config(self) -> str:
        said, _ = self.etcd.ask("GET", f"{self.root}/config?quorum=true")
        return said["node"]["value"]

    def leases(self) -> tuple[list[Lease], int]:
        try:
            said, headers = self.etcd.ask("GET", f"{self.root}/subnets?quorum=true&recursive=true")
        except Refused as refused:
            if refused.code != 100:
                raise
            return [], 0
        found = [self._lease(node) for node in said["node"].get("nodes", [])]
        return [one for one in found if one is not None], int(headers["X-Etcd-Index"])

    def create(self, name: str, value: str) -> float:
        return self._put(name, {"value": value, "prevExist": "false", "ttl": str(self.ttl)})

    def update(self, name: str, value: str, *, forever: bool = False) -> float:
        return self._put(name, {"value": value} | ({} if forever else {"ttl": str(self.ttl)}))

    def delete(self, name: str) -> None:
        self.etcd.ask("DELETE", f"{self.root}/subnets/{quote(name)}")

    def watch(self, cursor: int):
        """One request an event, after `cursor`."""
        while True:
            path = f"{self.root}/subnets?wait=true&recursive=true&waitIndex={cursor + 1}"
            link, answer = self.etcd.open("GET", path, None, {}, None)
            try:
                text = answer.read()
            finally:
                link.close()
            if not text:
                continue  # etcd ends a long poll now and then
            said = json.loads(text)
            if answer.status >= 400:
                raise Refused(answer.status, said.get("errorCode"), str(said.get("message")))
            cursor = said["node"]["modifiedIndex"]
            gone = said["action"] in {"delete", "expire"}
            lease = self._lease(said["node"])
            if lease is None:
                log(f"watch of subnets: {said['node']['key']!r}: not a subnet, skipping")
            else:
                yield gone, lease, cursor

    def _put(self, name: str, form: dict[str, str]) -> float:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        said, _ = self.etcd.ask("PUT", f"{self.root}/subnets/{quote(name)}", urlencode(form), headers)
        return self._expiration(said["node"])

    def _lease(self, node: dict) -> Lease | None:
        return read_lease(node["key"], node.get("value"), self._expiration(node))

    @staticmethod
    def _expiration(node: dict) -> float:
        """etcd's absolute time: the hosts' clocks matter there; here all hosts share one, so the TTL tells the same."""
        return time.time() + node["ttl"] if "ttl" in node else 0.0


class V3:
    """The calls of 0.28.9, over etcd's JSON gateway instead of gRPC."""

    def __init__(self, endpoints: str, prefix: str, ttl: int) -> None:
        self.etcd = Etcd(endpoints)
        parts = [part for part in prefix.split("/") if part]
        self.root = ("/" if prefix.startswith("/") else "") + "/".join(parts)
        self.ttl = ttl

    def config(self) -> str:
        said = self._ask("kv/range", key=_b64(f"{self.root}/config"))
        if not said.get("kvs"):
            raise Refused(404, 100, f"key not found ({self.root}/config)")
        return _text(said["kvs"][0]["value"])

    def leases(self) -> tuple[list[Lease], int]:
        # Without a slash behind `subnets`, as there.
        said = self._ask("kv/range", **_prefix(f"{self.root}/subnets"))
        found = []
        for kv in said.get("kvs", []):
            left = -1
            if int(kv.get("lease", 0)):
                left = int(self._ask("lease/timetolive", ID=kv["lease"]).get("TTL", -1))
            # -1, of a key without lease, becomes "ended a second ago", which is not the zero of a reservation.
            found.append(read_lease(_text(kv["key"]), _text(kv.get("value", "")), time.time() + left))
        return [one for one in found if one is not None], int(said["header"]["revision"])

    def create(self, name: str, value: str) -> float:
        key, lease = _b64(f"{self.root}/subnets/{name}"), self._grant()
        said = self._ask(
            "kv/txn",
            compare=[{"key": key, "target": "VERSION", "version": "0"}],
            success=[{"requestPut": {"key": key, "value": _b64(value), "lease": lease}}],
        )
        if not said.get("succeeded"):
            self._ask("lease/revoke", ID=lease)
            raise Refused(412, 105, "subnet already exists")
        return time.time() + self.ttl

    def update(self, name: str, value: str, *, forever: bool = False) -> float:
        key = _b64(f"{self.root}/subnets/{name}")
        self._ask("kv/put", key=key, value=_b64(value), lease=self._grant())
        return time.time() + self.ttl

    def delete(self, name: str) -> None:
        self._ask("kv/deleterange", key=_b64(f"{self.root}/subnets/{name}"))

    def watch(self, cursor: int):
        wanted = {**_prefix(f"{self.root}/subnets"), "start_revision": str(cursor + 1)}
        link, answer = self.etcd.open("POST", "/v3/watch", json.dumps({"create_request": wanted}), {}, None)
        try:
            while line := answer.readline():
                said = json.loads(line)["result"]
                cursor = max(cursor, int(said["header"]["revision"]))
                if said.get("canceled"):
                    raise Refused(500, 401, said.get("cancel_reason", "canceled"))
                for event in said.get("events", []):
                    kv = event["kv"]
                    gone = event.get("type") == "DELETE"
                    value = None if gone else _text(kv.get("value", ""))
                    lease = read_lease(_text(kv["key"]), value, time.time() + self.ttl)
                    if lease is not None:
                        yield gone, lease, int(kv["mod_revision"])
        finally:
            link.close()
        raise OSError("the watch ended")

    def _grant(self) -> str:
        return self._ask("lease/grant", TTL=str(self.ttl))["ID"]

    def _ask(self, what: str, **wanted: object):
        return self.etcd.ask("POST", f"/v3/{what}", json.dumps(wanted))[0]


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _text(coded: str) -> str:
    return base64.b64decode(coded).decode()


def _prefix(text: str) -> dict[str, str]:
    return {"key": _b64(text), "range_end": _b64(text[:-1] + chr(ord(text[-1]) + 1))}


class Config:
    def __init__(self, text: str, *, old: bool) -> None:
        said = {name.lower(): value for name, value in json.loads(text).items()}
        self.network = IPv4Network(said["network"])
        length = self.network.prefixlen
        default = (24 if length < 24 else length + 1) if old else (24 if length <= 22 else length + 2)
        self.subnet_len = said.get("subnetlen") or default
        self.step = 1 << (32 - self.subnet_len)
        base = int(self.network.network_address)
        self.first = int(IPv4Address(said["subnetmin"])) if said.get("subnetmin") else base + self.step
        last = base + self.network.num_addresses - self.step
        self.last = int(IPv4Address(said["subnetmax"])) if said.get("subnetmax") else last
        backend = {name.lower(): value for name, value in (said.get("backend") or {}).items()}
        if backend.get("type", "udp") != "udp":
            raise SystemExit(f"the stand-in has no backend {backend['type']}")
        self.port = backend.get("port", 8285)

    def fits(self, subnet: IPv4Network) -> bool:
        at = int(subnet.network_address)
        return subnet.prefixlen == self.subnet_len and self.first <= at <= self.last

    def pick(self, taken: list[IPv4Network]) -> IPv4Network:
        free: list[IPv4Network] = []
        for at in range(self.first, self.last + 1, self.step):
            subnet = IPv4Network((at, self.subnet_len))
            if not any(subnet.overlaps(one) for one in taken):
                free.append(subnet)
                if len(free) == FREE_ONES:
                    break
        if not free:
            raise SystemExit("out of subnets")
        return random.choice(free)


class Revoked(Exception):
    """Our own lease is gone."""


class Flanneld:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.old = options.like == "0.7.1"
        self.registry = (V2 if self.old else V3)(options.etcd_endpoints, options.etcd_prefix, options.ttl)
        self.address, self.mtu = _interface(options.iface)
        self.public_ip = options.public_ip or self.address
        self.inbox: queue.SimpleQueue[tuple] = queue.SimpleQueue()

    @property
    def value(self) -> str:
        """Go's json.Marshal of LeaseAttrs: only what its struct knows, so fields of others are lost here."""
        ours = {"PublicIP": self.public_ip} | ({} if self.old else {"PublicIPv6": None})
        return json.dumps(ours, separators=(",", ":"))

    def run(self) -> None:
        if self.options.static:
            self.serve_static()
        while True:
            try:
                self.serve()
            except Revoked:
                if not self.old:
                    log("Lease has been revoked. Shutting down daemon.")
                    return
                log("Lease has been revoked")

    def serve_static(self) -> None:
        subnet = IPv4Network(self.options.static)
        network = IPv4Network(self.options.network)
        with Device(self, network, subnet, self.options.port) as device:
            for peer in self.options.peer:
                target, _, address = peer.partition("=")
                device.route(IPv4Network(target), address)
            self.write_subnet_file(network, subnet)
            log(f"ready {subnet} on {device.name}")
            signal.pause()

    def serve(self) -> None:
        """Acquire, carry, renew, until the lease is revoked."""
        config = self.wait_config()
        subnet, expiration = self.acquire(config)
        with Device(self, config.network, subnet, config.port) as device:
            stop = threading.Event()
            threading.Thread(target=self.watch, args=(stop,), daemon=True).start()
            self.write_subnet_file(config.network, subnet)
            log(f"ready {subnet} on {device.name}")
            try:
                self.loop(device, subnet, expiration)
            finally:
                stop.set()

    def loop(self, device: Device, subnet: IPv4Network, expiration: float) -> None:
        margin = self.options.subnet_lease_renew_margin * 60
        while True:
            # A reservation's zero makes 0.7.1's timer wrap to 292 years.
            wait = max(0.0, expiration - margin - time.time()) if expiration else None
            try:
                gone, lease = self.inbox.get(timeout=wait)
            except queue.Empty:
                try:
                    expiration = self.registry.update(_name(subnet), self.value)
                    log(f"Lease renewed, new expiration: {expiration:.0f}")
                except (OSError, Refused) as error:
                    log(f"Error renewing lease (trying again in 1 min): {error}")
                    expiration = time.time() + margin + 60
                continue
            if lease.subnet != subnet:
                device.route(lease.subnet, None if gone else lease.public_ip)
            elif gone:
                raise Revoked
            else:
                expiration = lease.expiration  # the PublicIP in it is not looked at

    def wait_config(self) -> Config:
        while True:
            try:
                return Config(self.registry.config(), old=self.old)
            except (OSError, Refused, ValueError, KeyError) as error:
                log(f"Couldn't fetch network config: {error}")
                time.sleep(1)

    def acquire(self, config: Config) -> tuple[IPv4Network, float]:
        for _ in range(10):
            try:
                return self.try_acquire(config)
            except Refused as refused:
                if not self.old:
                    raise SystemExit(f"{refused}") from None  # compared with the wrong error: no second try
                log(f"{refused}")
            except OSError as error:
                log(f"Failed to acquire lease: {error}")
                time.sleep(1)
        raise SystemExit("Max retries reached trying to acquire a subnet")

    def try_acquire(self, config: Config) -> tuple[IPv4Network, float]:
        leases, _ = self.registry.leases()
        for lease in leases:
            if lease.public_ip != self.public_ip:
                continue
            name = _name(lease.subnet)
            if config.fits(lease.subnet):
                log(f"Found lease ({lease.subnet}) for current IP ({self.public_ip}), reusing")
                forever = lease.expiration == 0
                return lease.subnet, self.registry.update(name, self.value, forever=forever)
            log(
                f"Found lease ({lease.subnet}) for current IP ({self.public_ip}) but not compatible, deleting"
            )
            self.registry.delete(name)
            break
        subnet = None if self.old else self.previous(config, leases)
        if subnet is None:
            subnet = config.pick([lease.subnet for lease in leases])
        expiration = self.registry.create(_name(subnet), self.value)
        log(f"Lease acquired: {subnet}")
        return subnet, expiration

    def previous(self, config: Config, leases: list[Lease]) -> IPv4Network | None:
        try:
            with open(self.options.subnet_file) as file:
                found = re.search(r"(?m)^FLANNEL_SUBNET=(\S+)$", file.read())
        except OSError:
            return None
        if found is None:
            return None
        subnet = IPv4Network(found[1], strict=False)
        if not config.fits(subnet) or any(lease.subnet == subnet for lease in leases):
            return None
        log(f"Found previously leased subnet ({subnet}), reusing")
        return subnet

    def watch(self, stop: threading.Event) -> None:
        """List, then watch; on a lost history list again. The differences go by subnet only."""
        known: dict[IPv4Network, Lease] = {}
        cursor = None
        while not stop.is_set():
            try:
                if cursor is None:
                    leases, cursor = self.registry.leases()
                    now = {lease.subnet: lease for lease in leases}
                    for subnet in known.keys() - now.keys():
                        self.inbox.put((True, known[subnet]))
                    for subnet in now.keys() - known.keys():
                        self.inbox.put((False, now[subnet]))
                    known = now
                for gone, lease, seen in self.registry.watch(cursor):
                    if stop.is_set():
                        return
                    cursor = seen
                    known.pop(lease.subnet, None) if gone else known.update({lease.subnet: lease})
                    self.inbox.put((gone, lease))
            except Refused as refused:
                log(f"Watch of subnet leases failed: {refused}")
                cursor = None if refused.code == 401 else cursor
                time.sleep(0.2)
            except (OSError, ValueError, http.client.HTTPException) as error:
                log(f"Watch subnets: {error}")
                time.sleep(1 if self.old else 0.2)

    def write_subnet_file(self, network: IPv4Network, subnet: IPv4Network) -> None:
        path = self.options.subnet_file
        folder, name = os.path.split(path)
        os.makedirs(folder or ".", 0o755, exist_ok=True)
        text = (
            f"FLANNEL_NETWORK={network}\n"
            f"FLANNEL_SUBNET={subnet.network_address + 1}/{subnet.prefixlen}\n"
            f"FLANNEL_MTU={self.mtu - 28}\n"
            f"FLANNEL_IPMASQ={'true' if self.options.ip_masq else 'false'}\n"
        )
        beside = os.path.join(folder, f".{name}")
        with open(beside, "w") as file:
            file.write(text)
            if not self.old:
                os.fchmod(file.fileno(), 0o644)
                file.flush()
                os.fsync(file.fileno())
        os.rename(beside, path)


class Device:
    """The TUN, the socket and proxy.c's process; all of it vanishes with this process."""

    def __init__(self, daemon: Flanneld, network: IPv4Network, subnet: IPv4Network, port: int) -> None:
        self.port = port
        mtu = daemon.mtu - 28
        self.tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        wish = struct.pack("16sH22x", b"flannel%d", IFF_TUN | IFF_NO_PI)
        self.name = fcntl.ioctl(self.tun, TUNSETIFF, wish)[:16].rstrip(b"\0").decode()
        length = network.prefixlen if daemon.old else 32
        _ip(f"addr add {subnet.network_address}/{length} dev {self.name}")
        _ip(f"link set {self.name} mtu {mtu} up")
        if not daemon.old:
            _ip(f"route add {network} dev {self.name}")
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((daemon.address, port))
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = (self.tun, self.socket.fileno(), theirs.fileno())
        words = [*map(str, fds), str(subnet.network_address), str(mtu)]
        self.proxy = subprocess.Popen([daemon.options.proxy, *words], pass_fds=fds, stdin=subprocess.DEVNULL)
        theirs.close()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self._tell(3)
        self.control.close()
        self.socket.close()
        os.close(self.tun)
        try:
            self.proxy.wait(2)
        except subprocess.TimeoutExpired:
            self.proxy.kill()  # stop starves under load
            self.proxy.wait()

    def route(self, subnet: IPv4Network, public_ip: str | None) -> None:
        """Set, or without an address remove: 0.7.1 tells the proxy, whatever the lease's BackendType."""
        log(f"Subnet {'removed' if public_ip is None else 'added'}: {subnet}")
        self._tell(2 if public_ip is None else 1, subnet, public_ip or "0.0.0.0")

    def _tell(self, what: int, subnet: IPv4Network = EVERYTHING, address: str = "0.0.0.0") -> None:
        net, hop = subnet.network_address.packed, IPv4Address(address).packed
        message = (
            struct.pack("=i", what)
            + net
            + struct.pack("=i", subnet.prefixlen)
            + hop
            + struct.pack("=Hxx", self.port)
        )
        try:
            self.control.send(message)
        except OSError:
            pass  # it has ended


def _name(subnet: IPv4Network) -> str:
    return str(subnet).replace("/", "-")


def _interface(name: str) -> tuple[str, int]:
    """The first IPv4 address of an interface and its MTU."""
    said = json.loads(subprocess.run(["ip", "-j", "-4", "addr", "show", "dev", name], capture_output=True, check=True).stdout)  # fmt: skip
    return said[0]["addr_info"][0]["local"], said[0]["mtu"]


def _ip(words: str) -> None:
    done = subprocess.run(["ip", *words.split()], capture_output=True, text=True, check=False)
    if done.returncode != 0 and "File exists" not in done.stderr:
        raise SystemExit(f"ip {words}: {done.stderr.strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(prefix_chars="-", allow_abbrev=False, description=__doc__.split("\n")[0])

    def flag(name: str, **more: object) -> None:
        parser.add_argument(f"-{name}", f"--{name}", dest=name.replace("-", "_"), **more)

    flag("like", choices=("0.7.1", "0.28.9"), default="0.7.1")
    flag("static", metavar="SUBNET", default="")
    flag("network", default="172.17.0.0/16")
    flag("port", type=int, default=8285)
    flag("peer", metavar="SUBNET=PUBLIC-IP", action="append", default=[])
    flag("ttl", type=int, default=SUBNET_TTL)
    flag("proxy", required=True)
    flag("etcd-endpoints", default="http://127.0.0.1:4001,http://127.0.0.1:2379")
    flag("etcd-prefix", default="/coreos.com/network")
    flag("iface", required=True)
    flag("public-ip", default="")
    flag("subnet-file", default="/run/flannel/subnet.env")
    flag("subnet-lease-renew-margin", type=int, default=60)
    flag("ip-masq", action="store_true")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    Flanneld(parser.parse_args()).run()


if __name__ == "__main__":
    main()
