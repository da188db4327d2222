"""`flanctl status`: this host on one screen, the verdict first."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flanctl.commands import output
from flanctl.commands.options import output_options, place_options, registry_options, settings, write_out
from flanctl.errors import FlanctlError, LeaseLost, NotPermitted, RegistryUnreachable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flanctl.agent.host import Facts
    from flanctl.settings import Settings

OK, WARN, FAIL, SKIP = "ok", "warn", "fail", "skip"
QUICK = 2.0
"""Seconds the registry gets when the agent cannot be asked: a host whose etcd is away too wants its answer now."""
SHOWN = 5
"""Problems of one kind on the screen; -w json has all."""

_CHECKS = {
    "lease-foreign": "lease",
    "lease-missing": "lease",
    "lease-short": "lease",
    "clone": "lease",
    "registry-unreachable": "registry",
    "registry-denied": "registry",
    "no-config": "registry",
    "config-invalid": "registry",
    "config-changed": "registry",
    "registry-doubted": "registry",
    "backend-unsupported": "registry",
    "pool-full": "registry",
    "watch-old": "registry",
    "loop-stalled": "agent",
    "data-path": "data",
    "device-gone": "data",
    "address-gone": "data",
    "kernel-error": "data",
    "routes-missing": "peers",
    "rules-missing": "data",
    "docker0-old": "docker",
    "docker-accept": "docker",
    "docker-closed": "docker",
    "docker-file-stale": "docker",
    "stale-subnet-env": "subnet.env",
    "healthz-port": "agent",
    "bad-state": "agent",
}
"""On whose line a problem stands; the others are about peers."""

_NEXT = {
    "lease-foreign": "stop one of the two hosts, then start the agent again; see: flanctl subnets ls",
    "lease-missing": "see the registry's line; the agent takes its lease again once it answers",
    "registry-unreachable": "bring the registry back; the agent tries again by itself and needs no restart",
    "registry-denied": "check --user and its password, --cert and --key, and the role's right to write the prefix",
    "no-config": "flanctl net init --network …",
    "config-invalid": "flanctl net get | flanctl net validate -",
    "config-changed": "restart the agents when their containers may change address; flanctl net get",
    "registry-doubted": "see that etcd has its data; every host writes its lease again by itself",
    "bad-state": "see that the state directory's disk is there, writable and not full",
    "clone": "give one of the two hosts another address, or stop its agent",
    "pool-full": "flanctl capacity; flanctl subnets ls",
    "loop-stalled": "kill the agent, systemd starts it again; its log may say on what it hangs",
    "docker0-old": "restart docker when its containers may stop",
    "docker-closed": (
        "if daemon.json names the nftables backend, restart the agent's unit when containers may stop; if dockerd's"
        " command line does, give docker-opts in that unit --accept first (ExecStartPost=); docs/docker.md"
    ),
    "docker-file-stale": (
        "restart the agent's unit when containers may stop: its ExecStartPost= writes the file anew;"
        " then docker, if the unit did not restart it"
    ),
    "stale-subnet-env": "restart the agent; it writes the file anew",
    "address-gone": "restart the agent once the address is right",
    "two-flannels": "systemctl disable --now flanneld",
    "agent-missing": "systemctl start flanctl-agent",
    "agent-silent": "kill the agent, systemd starts it again",
    "duplicate-ip": "flanctl subnets ls",
    "overlap": "flanctl subnets ls",
    "outside-network": "flanctl subnets ls",
}


@dataclass(frozen=True, slots=True)
class Line:
    """One fact: a word, what it is about, the sentence, and the problem's id where it is one."""

    word: str
    about: str
    says: str
    id: str | None = None
    details: tuple[str, ...] = ()


@dataclass(slots=True)
class View:
    """What is known of this host."""

    document: dict[str, Any]
    """The agent's own, or all null without one."""
    agent: str
    """answers, missing, silent, forbidden or unknown."""
    error: FlanctlError | None
    facts: Facts
    lease: dict[str, Any] | None = None
    """Without the agent: what the registry holds in our name."""
    lines: list[Line] = field(default_factory=list)

    @property
    def problems(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.document["problems"]
        return found

    def add(
        self, word: str, about: str, says: str, id_: str | None = None, details: tuple[str, ...] = ()
    ) -> None:
        """A line of our own; with an id it is a problem like those the agent knows."""
        self.lines.append(Line(word, about, says, id_, details))
        if id_ is not None and all(problem["id"] != id_ for problem in self.problems):
            self.problems.append(
                {"id": id_, "severity": word, "message": says, "details": list(details), "since": None}
            )


@click.command()
@click.option("--brief", is_flag=True, help="One line: the first one, or `fail ID`.")
@click.option("--strict", is_flag=True, help="A warning ends with 1 too.")
@place_options
@registry_options
@output_options
def status(brief: bool, strict: bool) -> None:
    """Show how this host is: lease, registry, peers, packets, docker.

    Asks the agent, and when nobody answers says what files, kernel and registry still tell.

    \b
    Exit codes: 0 ready, 1 degraded, starting or silent, 3 the registry does not answer the agent,
    4 no agent on this host, 7 not permitted to ask it, 8 the lease is lost.

    \b
    Examples:
      flanctl status
      flanctl status --brief || mail -s "$(hostname): $(flanctl status --brief)" ops < /dev/null
    """
    view = _look(settings())
    code = _exit_code(view, strict=strict)
    view.document["exit"] = code
    form = write_out()
    if brief:
        output.line(_brief(view, code))
    elif form == "json":
        output.json({**view.document, **_local(view)})
    elif form == "simple":
        output.simple(_rows(view))
    else:
        _screen(view)
    click.get_current_context().exit(code)


def _look(chosen: Settings) -> View:
    from flanctl.agent.host import look_around
    from flanctl.agent.snapshot import FIELDS
    from flanctl.agent.status_client import NoAgent, Silent, ask

    chosen.seconds("timeout")  # nonsense is refused whether or not it is needed in the end
    kinds = {NoAgent: "missing", Silent: "silent", NotPermitted: "forbidden"}
    run_dir, subnet_path = Path(chosen.path("run_dir")), Path(chosen.path("subnet_file"))
    document: dict[str, Any] = dict.fromkeys(FIELDS)
    document |= {"schema": output.SCHEMA, "host": os.uname().nodename, "problems": []}
    agent = "answers"
    error: FlanctlError | None = None
    try:
        document |= ask(run_dir / "agent.sock")  # an older agent lacks what came later: unknown
        if isinstance(told := document.get("subnet_file"), str):
            subnet_path = Path(told)  # the agent's own word counts more than our default
    except FlanctlError as failure:
        error = failure
        agent = next((word for kind, word in kinds.items() if isinstance(failure, kind)), "unknown")
    view = View(document, agent, error, look_around(subnet_path))
    if error is None:
        _agents_lines(view)
    else:
        _without_agent(view, error)
        _ask_registry(view, chosen)
    _hosts_lines(view)
    return view


# ---- what the agent says --------------------------------------------------------------------------------------------


def _agents_lines(view: View) -> None:
    document = view.document
    by_check: dict[str, list[dict[str, Any]]] = {}
    for problem in view.problems:
        by_check.setdefault(_CHECKS.get(problem["id"], "peers"), []).append(problem)
    for about, fact in (
        ("agent", None),
        ("lease", _lease_words(document)),
        ("registry", _registry_words(document)),
        ("peers", _peers_words(document)),
        ("data", _data_words(document)),
    ):
        there = by_check.get(about, [])
        if fact is not None and (about in {"peers", "data"} or not there):
            view.lines.append(Line(OK, about, fact))
        trouble = (document["registry"] or {}).get("trouble") or {}
        for problem in there[:SHOWN]:
            says = problem["message"]
            if problem["id"] == trouble.get("id") and trouble.get("seconds"):
                says += f", for {output.age(trouble['seconds'])}"
            details = tuple(map(str, problem.get("details", ())))
            view.lines.append(Line(problem["severity"], about, says, problem["id"], details))
        if len(there) > SHOWN:
            view.lines.append(Line(WARN, about, f"{len(there) - SHOWN} more; -w json has them"))


def _lease_words(document: Mapping[str, Any]) -> str | None:
    lease = document["lease"]
    if lease is None:
        return None
    if lease["kind"] == "reservation":
        return f"{lease['subnet']} for {document['public_ip']}, reserved, never ends"
    left, renewed = lease["seconds_left"], lease["renewed_seconds_ago"]
    words = f"{lease['subnet']} for {document['public_ip']}, {output.age(left)} left"
    away = document["registry"]["answers"] is False
    if away:
        return f"{words}; packets flow until peers see it expire"
    return words if renewed is None else f"{words}, renewed {output.age(renewed)} ago"


def _registry_words(document: Mapping[str, Any]) -> str | None:
    registry = document["registry"]
    if not registry["store"]:
        return None
    words = str(registry["store"])
    if registry["watch_revision"] is not None:
        words += f", watch at revision {registry['watch_revision']}"
    if (
        registry["watch_seconds_ago"] is not None
    ):  # not when any request was answered last: a watch may be dead
        words += f", last word {output.age(registry['watch_seconds_ago'])} ago"
    return words


def _peers_words(document: Mapping[str, Any]) -> str | None:
    peers = document["peers"]
    if peers["count"] is None:
        return None
    words = f"{peers['count']} known"
    if peers["count"] and (flanctl := peers.get("flanctl")) is not None:  # an older agent does not tell
        rest = peers["count"] - flanctl
        words += f", {flanctl} flanctl and {rest} flanneld" if rest else ", all flanctl"
    registry = document["registry"]
    if registry["answers"] is False and registry["watch_seconds_ago"] is not None:
        words += f", as of revision {peers['revision']}, {output.age(registry['watch_seconds_ago'])} old"
    kernel = document["kernel"]
    counts = [
        f"{name} {kernel[kind]['wanted'] - kernel[kind]['missing']} of {kernel[kind]['wanted']}"
        for kind, name in (("route", "routes"), ("rule", "rule chains"))
        if kind in kernel
    ]
    return "; ".join([words, ", ".join(counts)]) if counts else words


def _data_words(document: Mapping[str, Any]) -> str | None:
    counters = document["counters"]
    if not counters:
        return None
    words = (
        f"{document['data_path']} path; {_count(counters.get('out_packets', 0))} packets out,"
        f" {_count(counters.get('in_packets', 0))} in"
    )
    why = document["data_path_why"]
    if why and not why.startswith("--"):  # a setting is no news to who made it
        words = words.replace(" path;", f" path ({why});", 1)
    lost = [
        f"{name} ({level['why']})" for name, level in (document["offloads"] or {}).items() if not level["on"]
    ]
    if lost:
        words += f", without {', '.join(lost)}"
    if (dropped := document["dropped_recently"]) is not None:
        words += f", {_count(dropped)} dropped in the last {output.age(document['dropped_recently_seconds'])}"
    return words


def _count(number: int) -> str:
    """`812`, `1.2M`: for people."""
    amount = float(number)
    for unit in ("", "k", "M", "G"):
        if amount < 1000:
            return f"{number}" if not unit else f"{amount:.1f}{unit}"
        amount /= 1000
    return f"{amount:.1f}T"


# ---- what is known without the agent ----------------------------------------------------------------------------------


def _without_agent(view: View, error: FlanctlError) -> None:
    flanctl = [pid for name, pid in view.facts.processes if name == "flanctl agent"]
    flanneld = [pid for name, pid in view.facts.processes if name == "flanneld"]
    says = error.message
    if view.agent == "missing":
        running = f", though pid {flanctl[0]} is one" if flanctl else " and no process runs it"
        says = f"no agent on this host: {error.message}{running}"
    elif flanctl:
        says += f" (pid {', '.join(map(str, flanctl))})"
    word = SKIP if view.agent == "forbidden" else FAIL
    view.add(word, "agent", says, None if view.agent == "forbidden" else error.id)
    for pid in flanneld:
        view.add(WARN, "agent", f"flanneld runs as pid {pid}")


def _ask_registry(view: View, chosen: Settings) -> None:
    """What the registry holds in our name, if it answers quickly."""
    from dataclasses import replace

    if chosen.seconds("timeout") > QUICK:
        chosen.values["timeout"] = replace(chosen.values["timeout"], text=str(QUICK))
    try:
        _compare_with_registry(view, chosen)
    except LeaseLost as error:
        view.add(FAIL, "lease", error.message, error.id)
    except RegistryUnreachable as error:
        view.add(SKIP, "registry", error.message, details=error.details)
    except FlanctlError as error:
        view.add(SKIP, "registry", error.message)


def _compare_with_registry(view: View, chosen: Settings) -> None:
    """Raises LeaseLost when the subnet that this host's subnet.env names is another host's."""
    from flanctl.agent.kernel.addresses import local_addresses
    from flanctl.registry.config import read_config
    from flanctl.registry.session import session

    ours = {str(address) for address in local_addresses() if not address.is_loopback}
    ours |= {text for text in (chosen.optional("public_ip"),) if text}
    had = None if view.facts.subnet_file is None else view.facts.subnet_file.subnet
    with session(chosen) as registry:
        config = read_config(registry.store, registry.prefix, registry.wanted_dialect).config
        view.document["network"] = str(config.network)
        view.document["backend"] = config.backend_type
        leases = registry.leases()
        table = leases.table()
        mine = [lease for lease in table.leases if str(lease.attributes.public_ip) in ours]
        holder = next((lease for lease in table.leases if lease.subnet == had), None)
        if holder is not None and holder not in mine:
            public_ip = holder.attributes.public_ip
            if not _announced_by_us(registry.store, registry.prefix, public_ip, chosen):
                raise LeaseLost(f"lease {had} belongs to {public_ip} at revision {holder.revision}")
            mine = [holder]
        # What subnet.env says counts, of several.
        mine.sort(key=lambda lease: lease.subnet != had)
        for lease in mine[:1]:
            (asked,) = [one for one in leases.find(lease.subnet) if one.key == lease.key] or [lease]
            left = None if asked.ttl is None else int(asked.ttl)
            view.lease = {
                "subnet": str(asked.subnet),
                "public_ip": str(asked.attributes.public_ip),
                "kind": "reservation" if asked.reservation else "lease",
                "seconds_left": left,
                "revision": asked.revision,
            }
            ends = "reserved" if asked.reservation else f"{output.age(left)} left"
            about = (
                f"{asked.subnet} of {asked.attributes.public_ip} is in {registry.store.describe()}, {ends}"
            )
            view.add(OK, "lease", about)
        if not mine:
            view.add(WARN, "lease", f"the registry holds none for this host ({registry.store.describe()})")


def _announced_by_us(store: Any, prefix: str, public_ip: Any, chosen: Settings) -> bool:
    """A host behind NAT announces an address it does not have; the random instance in its state file tells."""
    from flanctl.agent import state
    from flanctl.registry.announcements import announcements

    try:
        remembered = state.load(Path(chosen.path("state_dir")))
    except FlanctlError:
        return False
    said = announcements(store, prefix).get(public_ip)
    return remembered is not None and said is not None and said.instance == remembered.instance


# ---- what the host shows ----------------------------------------------------------------------------------------------


def _hosts_lines(view: View) -> None:
    facts, document = view.facts, view.document
    held = document["lease"] or view.lease
    lease = None if held is None else IPv4Network(held["subnet"])
    file = facts.subnet_file
    starting = document["state"] in {"starting", "leased"}
    if file is not None and lease is not None and file.subnet != lease:
        says = f"{facts.subnet_path} says {file.subnet}, the lease is {lease}"
        view.add(WARN if starting else FAIL, "subnet.env", says, "stale-subnet-env")
    elif file is not None:
        view.add(OK, "subnet.env", f"{file.interface}, mtu {file.mtu}")
    elif lease is not None and not starting:
        word = FAIL if view.agent == "answers" else WARN
        view.add(word, "subnet.env", facts.subnet_trouble or "unknown", "stale-subnet-env")
    else:
        view.add(SKIP, "subnet.env", facts.subnet_trouble or "unknown")
    if view.agent == "answers":
        for name, pid in facts.processes:
            if name == "flanneld" and pid != document["pid"]:  # the agent itself may bear that name
                view.add(WARN, "agent", f"flanneld runs beside the agent, pid {pid}", "two-flannels")
    _device_line(view)
    _docker_lines(view, lease)


def _device_line(view: View) -> None:
    facts = view.facts
    if facts.kernel_trouble is not None:
        view.add(SKIP, "device", facts.kernel_trouble)
        return
    link = facts.device
    if link is None:
        view.add(SKIP, "device", "there is no flannel0")
        return
    address = ", ".join(str(one.ip) for one in link.addresses) or "no address"
    words = f"{link.name} {address}, mtu {link.mtu}, {'up' if link.up else 'down'}"
    if facts.routes:
        shown = ", ".join(facts.routes[:3]) + (
            f" and {len(facts.routes) - 3} more" if facts.routes[3:] else ""
        )
        words += f", route to {shown}"
    if view.agent == "missing" and link.kind == "tun" and not link.carrier:
        view.add(WARN, "device", f"{words}; no process holds it: no packet passes")
    else:
        view.add(OK, "device", words)


def _docker_lines(view: View, lease: IPv4Network | None) -> None:
    facts = view.facts
    subnet = lease or (None if facts.subnet_file is None else facts.subnet_file.subnet)
    wanted = None if subnet is None else f"{subnet.network_address + 1}/{subnet.prefixlen}"
    view.document["problems"] = [one for one in view.problems if one["id"] != "docker0-old"]
    if facts.docker_bip is not None and wanted is not None and facts.docker_bip != wanted:
        says = f"{facts.docker_path} says --bip={facts.docker_bip}, the lease wants {wanted}"
        view.add(WARN, "docker", says, "docker-file-stale")
    if facts.docker0 is None:
        if facts.docker_bip is not None and facts.kernel_trouble is None:
            view.add(SKIP, "docker", f"no docker0; {facts.docker_path} says --bip={facts.docker_bip}")
        return
    has = ", ".join(str(one) for one in facts.docker0.addresses) or "no address"
    if wanted is not None and wanted not in has.split(", "):
        view.add(WARN, "docker", f"docker0 is {has}, the lease wants {wanted}", "docker0-old")
    else:
        view.add(OK, "docker", f"docker0 is {has}{_accept_words(view.document)}")


def _accept_words(document: Mapping[str, Any]) -> str:
    """The state of the accept rules, where an agent keeps them."""
    accept = document.get("docker_accept")
    if accept is None:
        return ""
    if accept["mode"] == "off":
        return "; accept rules off"
    words = f"; accept rules {accept['rules'] - accept['missing']} of {accept['rules']}"
    if accept["programs"] != "iptables":
        words += f" by {accept['programs']}"
    if accept["behind"]:
        words += f", behind `{accept['behind'][0]}`"
        words += f" and {len(accept['behind']) - 1} more" if accept["behind"][1:] else ""
    return words


# ---- verdict and forms ------------------------------------------------------------------------------------------------


def _exit_code(view: View, *, strict: bool) -> int:
    ids = {problem["id"] for problem in view.problems}
    if "lease-foreign" in ids:
        return LeaseLost.exit_code
    if view.agent == "missing":
        return 4
    if view.agent == "forbidden":
        return NotPermitted.exit_code
    if view.agent != "answers":
        return 1
    if view.document["registry"]["answers"] is False:
        return RegistryUnreachable.exit_code
    bad = any(problem["severity"] == FAIL for problem in view.problems)
    if bad and view.document["verdict"] == "ready":
        view.document["verdict"] = "degraded"
    if bad or view.document["state"] != "ready":
        return 1
    return int(strict and any(problem["severity"] == WARN for problem in view.problems))


def _headline(view: View) -> str:
    document = view.document
    held = document["lease"] or view.lease
    verdict = document["verdict"] if view.agent == "answers" else f"agent {view.agent}"
    parts = [str(document["host"]), str(verdict)]
    if held is not None:
        parts.append(held["subnet"] + (f" of {document['network']}" if document["network"] else ""))
    elif view.facts.subnet_file is not None and view.agent != "answers":
        parts.append(f"{view.facts.subnet_file.subnet} of {view.facts.subnet_file.network}")
    if document["backend"] and document["data_path"]:
        parts.append(f"{document['backend']}/{document['data_path']}")
    if document["mtu"] is not None:
        parts.append(f"mtu {document['mtu']}")
    if document["state_seconds"] is not None:
        parts.append(f"since {output.age(document['state_seconds'])}")
    return "  ".join(parts)


def _brief(view: View, code: int) -> str:
    if code == 0:
        return _headline(view)
    worst = [problem["id"] for problem in view.problems if problem["severity"] == FAIL]
    worst += [problem["id"] for problem in view.problems if problem["severity"] == WARN]
    named = {8: "lease-foreign", 7: "not-permitted"}.get(code)
    return f"fail {named or (worst[0] if worst else view.document['state'] or 'unknown')}"


def _screen(view: View) -> None:
    output.line(_headline(view))
    following = [*(line.id for line in view.lines[1:]), None]
    for line, next_id in zip(view.lines, following, strict=True):
        id_ = f"   [{line.id}]" if line.id else ""
        output.line(f"{line.word:<4}  {line.about:<10} {line.says}{id_}")
        for detail in line.details[:SHOWN]:
            output.line(f"                 {detail}")
        if line.id in _NEXT and line.id != next_id:  # of several alike, below the last
            output.data(f"      next: {_NEXT[line.id]}")


def _local(view: View) -> dict[str, object]:
    """What this command found beside the agent's document."""
    facts = view.facts
    file, device, docker0 = facts.subnet_file, facts.device, facts.docker0
    return {
        "agent": view.agent,
        "local": {
            "registry_lease": view.lease,
            "subnet_file": str(facts.subnet_path),
            "subnet_env": None
            if file is None
            else {"network": str(file.network), "subnet": str(file.subnet), "mtu": file.mtu},
            "docker_file_bip": facts.docker_bip,
            "docker0": None if docker0 is None else [str(one) for one in docker0.addresses],
            "device": None
            if device is None
            else {"name": device.name, "mtu": device.mtu, "up": device.up, "routes": list(facts.routes)},
            "processes": [{"name": name, "pid": pid} for name, pid in facts.processes],
        },
    }


def _rows(view: View) -> Sequence[Sequence[object]]:
    """One fact a line: its name, its value."""
    document = view.document
    lease, registry = document["lease"] or view.lease or {}, document["registry"] or {}
    kernel, counters = document["kernel"] or {}, document["counters"] or {}
    routes = kernel.get("route", {})
    rows: list[Sequence[object]] = [
        ("host", document["host"]),
        ("agent", view.agent),
        ("verdict", document["verdict"]),
        ("state", document["state"]),
        ("state_seconds", document["state_seconds"]),
        ("exit", document["exit"]),
        ("network", document["network"]),
        ("subnet", lease.get("subnet")),
        ("lease_kind", lease.get("kind")),
        ("lease_seconds_left", lease.get("seconds_left")),
        ("public_ip", document["public_ip"] or lease.get("public_ip")),
        ("backend", document["backend"]),
        ("data_path", document["data_path"]),
        ("mtu", document["mtu"]),
        ("registry_answers", None if registry.get("answers") is None else str(registry["answers"]).lower()),
        ("watch_revision", registry.get("watch_revision")),
        ("watch_seconds_ago", registry.get("watch_seconds_ago")),
        ("peers", (document["peers"] or {}).get("count")),
        ("routes_wanted", routes.get("wanted")),
        ("routes_missing", routes.get("missing")),
        ("packets_out", counters.get("out_packets")),
        ("packets_in", counters.get("in_packets")),
        ("dropped_recently", document["dropped_recently"]),
        ("data_path_why", document["data_path_why"]),
    ]
    return [*rows, *(("problem", problem["id"], problem["severity"]) for problem in view.problems)]
