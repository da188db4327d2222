"""Every flag of flannel 0.7.1 and 0.28.9 (flannel.md 1.1), and what becomes of it here.

KEPT does what it did. ACCEPTED does nothing here and says so in one line, so that a unit goes on working. REFUSED would
be another program; the line says what to use instead. `docs/from-flannel.md` shows this table.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class Fate(enum.Enum):
    """What becomes of a flag."""

    KEPT = "kept"
    ACCEPTED = "accepted"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Flag:
    """One row. `kind` is string, bool, int or list (repeatable); `help` is what it does, or why it does nothing here."""

    name: str
    kind: str
    default: str
    versions: str
    fate: Fate
    help: str

    @property
    def variable(self) -> str:
        """flannel's rule: FLANNELD_ and the name in capitals."""
        return "FLANNELD_" + self.name.upper().replace("-", "_")


BOTH, OLD, NEW = "0.7.1, 0.28.9", "0.7.1", "0.28.9"
ENDPOINTS = "http://127.0.0.1:4001,http://127.0.0.1:2379"
PREFIX = "/coreos.com/network"

_KUBERNETES = "means something only with Kubernetes"
_NETWORKS = (
    "one agent serves one network; run one per network, each with its own -etcd-prefix and -subnet-file"
)
_REMOTE = "means something only with -remote or -listen"
_ONE_LEVEL = "flanctl logs at one level of detail"


def _kept(name: str, kind: str, default: str, versions: str, help: str) -> Flag:  # noqa: A002
    return Flag(name, kind, default, versions, Fate.KEPT, help)


def _accepted(name: str, kind: str, default: str, versions: str, why: str) -> Flag:
    return Flag(name, kind, default, versions, Fate.ACCEPTED, f"ignored: {why}")


def _refused(name: str, kind: str, default: str, versions: str, why: str) -> Flag:
    return Flag(name, kind, default, versions, Fate.REFUSED, f"refused: {why}")


FLAGS: Mapping[str, Flag] = {
    flag.name: flag
    for flag in (
        _kept("etcd-endpoints", "string", ENDPOINTS, BOTH, "etcd URLs, comma separated"),
        _kept("etcd-prefix", "string", PREFIX, BOTH, "key prefix of the network"),
        _kept("etcd-keyfile", "string", "", BOTH, "key of the client certificate"),
        _kept("etcd-certfile", "string", "", BOTH, "client certificate"),
        _kept("etcd-cafile", "string", "", BOTH, "CA certificate that signed the servers'"),
        _kept("etcd-username", "string", "", BOTH, "name to log in with"),
        _kept(
            "etcd-password", "string", "", BOTH, "password; better in FLANNELD_ETCD_PASSWORD, ps shows flags"
        ),
        _kept(
            "iface", "list", "", BOTH, "interface (name or address) that reaches the other hosts; repeatable"
        ),
        _kept("iface-regex", "list", "", NEW, "the same by regular expression; repeatable"),
        _kept("iface-can-reach", "string", "", NEW, "the interface that the route to this address uses"),
        _kept("public-ip", "string", "", BOTH, "address that other hosts send to"),
        _kept("subnet-file", "string", "/run/flannel/subnet.env", BOTH, "file that tells this host's subnet"),
        _kept(
            "subnet-lease-renew-margin",
            "int",
            "60",
            BOTH,
            "minutes before the lease's end to renew it, 1 to 1439",
        ),
        _kept("ip-masq", "bool", "false", BOTH, "masquerade packets that leave the network"),
        _kept("iptables-resync", "int", "5", NEW, "seconds between two looks at rules, device and routes"),
        _kept("iptables-forward-rules", "bool", "true", NEW, "accept forwarded packets of the network"),
        _kept("healthz-ip", "string", "0.0.0.0", NEW, "address for the health port"),  # noqa: S104  flannel's
        _kept("healthz-port", "int", "0", NEW, "port for /healthz, /readyz, /metrics and /status"),
        _kept("logtostderr", "bool", "true", OLD, "log to standard error instead of files"),
        _kept("alsologtostderr", "bool", "false", OLD, "log to standard error as well as files"),
        _kept("stderrthreshold", "string", "ERROR", OLD, "what goes to standard error beside the files"),
        _kept("log_dir", "string", "", OLD, "directory of the log files; $TMPDIR or /tmp when empty"),
        _kept("version", "bool", "false", BOTH, "print the version and end"),
        _kept("help", "bool", "false", BOTH, "print this help and end"),
        _accepted("v", "int", "0", BOTH, _ONE_LEVEL),
        _accepted("vmodule", "string", "", BOTH, _ONE_LEVEL),
        _accepted("log_backtrace_at", "string", "", BOTH, "there are no traces of Go here"),
        _accepted("public-ipv6", "string", "", NEW, "IPv6 is not carried"),
        _accepted(
            "ip-masq-fully-random-disable",
            "bool",
            "false",
            NEW,
            "ports are chosen at random where iptables can",
        ),
        _accepted("ip-blackhole-route", "bool", "false", NEW, "no blackhole route is made"),
        _accepted("kube-api-url", "string", "", NEW, _KUBERNETES),
        _accepted("kubeconfig-file", "string", "", NEW, _KUBERNETES),
        _accepted("kube-annotation-prefix", "string", "flannel.alpha.coreos.com", NEW, _KUBERNETES),
        _accepted("net-config-path", "string", "/etc/kube-flannel/net-conf.json", NEW, _KUBERNETES),
        _accepted("set-node-network-unavailable", "bool", "true", NEW, _KUBERNETES),
        _accepted("remote-keyfile", "string", "", OLD, _REMOTE),
        _accepted("remote-certfile", "string", "", OLD, _REMOTE),
        _accepted("remote-cafile", "string", "", OLD, _REMOTE),
        _accepted(
            "subnet-dir", "string", "/run/flannel/networks", OLD, "means something only with -networks"
        ),
        _refused(
            "kube-subnet-mgr",
            "bool",
            "false",
            BOTH,
            "Kubernetes is not served yet; keep flanneld on its nodes",
        ),
        _refused("listen", "string", "", OLD, "there is no server mode; let each host use -etcd-endpoints"),
        _refused("remote", "string", "", OLD, "there is no client mode; give -etcd-endpoints instead"),
        _refused("networks", "string", "", OLD, _NETWORKS),
        _refused("watch-networks", "bool", "false", OLD, _NETWORKS),
    )
}

SWITCHES = frozenset(flag.name for flag in FLAGS.values() if flag.kind == "bool")
