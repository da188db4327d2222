"""BPF programs on a link's traffic control hooks: reading, setting and deleting the filters that hold them.

    filters = Filters(kernel)
    filters.attach(link, "egress", descriptor, "flanctl_enc")     # in place of ours that is there, atomically
    filters.ours(link, "egress", "flanctl_enc")                   # the program's id, None if it is not there
    filters.detach(link, "egress", "flanctl_enc")

clsact and its filters exist on every kernel that has the BPF functions we need, live without a process or a pin, and
`tc filter show` prints them. Ours always have one preference and one handle, so that they replace each other and never
pile up. The preference is behind every one tc chooses by itself (it counts down from 49152): other programs run first,
and one that ends the chain only sends the packet to our user-space path.

Formats: include/uapi/linux/{rtnetlink,pkt_sched,pkt_cls}.h. Foreign filters are never touched.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flanctl.agent.kernel import attributes
from flanctl.errors import Conflict, FlanctlError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanctl.agent.kernel.door import Kernel

PREFERENCE, HANDLE = 58285, 1
RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
RTM_NEWTFILTER, RTM_DELTFILTER, RTM_GETTFILTER = 44, 45, 46
NLM_F_EXCL, NLM_F_CREATE, NLM_F_ACK, NLM_F_DUMP = 0x200, 0x400, 0x04, 0x300
CLSACT, CLSACT_PARENT = 0xFFFF0000, 0xFFFFFFF1
PARENTS = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
ETH_P_ALL = 0x0003
TCA_KIND, TCA_OPTIONS = 1, 2
TCA_BPF_FD, TCA_BPF_NAME, TCA_BPF_FLAGS, TCA_BPF_ID = 6, 7, 8, 11
TCA_BPF_FLAG_ACT_DIRECT = 1
_TCMSG = struct.Struct("=BxxxiIII")
_INFO = PREFERENCE << 16 | socket.htons(ETH_P_ALL)
"""tcm_info: the preference, and the protocol in network order."""


@dataclass(frozen=True, slots=True)
class Filter:
    """One filter of a hook. `name` and `program` (its id) only where it is a BPF one."""

    preference: int
    handle: int
    kind: str
    name: str = ""
    program: int = 0


class Filters:
    """The hooks of a namespace's links, by interface index."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def list(self, link: int, direction: str) -> tuple[Filter, ...]:
        """Those on one hook; none where there is no clsact, or no such link."""
        body = _TCMSG.pack(0, link, 0, PARENTS[direction], 0)
        answers = self._kernel.exchange(
            RTM_GETTFILTER, NLM_F_DUMP, body, f"list the filters of interface {link}"
        )
        return tuple(found for answer in answers if (found := _filter(answer)) is not None)

    def ours(self, link: int, direction: str, name: str) -> int | None:
        """Our program's id there. Raises Conflict when something else has our place."""
        for found in self.list(link, direction):
            if found.preference != PREFERENCE or (found.handle, found.kind) == (0, "bpf"):
                continue  # handle 0: the head of a preference's chain
            if found.kind == "bpf" and found.handle != HANDLE:
                continue  # beside ours, after it
            if found.name != name:
                raise Conflict(
                    f"a foreign {found.kind} filter ({found.name or found.handle}) has preference {PREFERENCE} on "
                    f"interface {link}, {direction}",
                    id="filter-foreign",
                )
            return found.program
        return None

    def attach(self, link: int, direction: str, descriptor: int, name: str) -> None:
        """The program on the hook, in place of ours if there is one. Raises Conflict for a foreign one."""
        self.ours(link, direction, name)
        self._have_clsact(link)
        options = attributes.pack(
            (TCA_BPF_FD, struct.pack("=I", descriptor)),
            (TCA_BPF_NAME, name.encode() + b"\0"),
            (TCA_BPF_FLAGS, struct.pack("=I", TCA_BPF_FLAG_ACT_DIRECT)),
        )
        body = self._ours(link, direction) + attributes.pack((TCA_KIND, b"bpf\0"), (TCA_OPTIONS, options))
        self._kernel.exchange(
            RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_ACK, body, f"attach {name} to interface {link}, {direction}"
        )

    def detach(self, link: int, direction: str, name: str) -> bool:
        """Take ours away; False if it was not there."""
        try:
            if self.ours(link, direction, name) is None:
                return False
            body = self._ours(link, direction)
            self._kernel.exchange(
                RTM_DELTFILTER, NLM_F_ACK, body, f"detach {name} from interface {link}, {direction}"
            )
        except Conflict:
            return False
        return True

    def tidy(self, link: int) -> None:
        """Take a clsact away on which no filter is left."""
        if any(self.list(link, direction) for direction in PARENTS):
            return
        try:
            body = _TCMSG.pack(0, link, CLSACT, CLSACT_PARENT, 0)
            self._kernel.exchange(RTM_DELQDISC, NLM_F_ACK, body, f"remove clsact from interface {link}")
        except FlanctlError:
            return  # there was none

    def _have_clsact(self, link: int) -> None:
        body = _TCMSG.pack(0, link, CLSACT, CLSACT_PARENT, 0) + attributes.pack((TCA_KIND, b"clsact\0"))
        try:
            self._kernel.exchange(
                RTM_NEWQDISC,
                NLM_F_CREATE | NLM_F_EXCL | NLM_F_ACK,
                body,
                f"add clsact to interface {link}",
            )
        except Conflict:
            return  # it is there

    def _ours(self, link: int, direction: str) -> bytes:
        return _TCMSG.pack(0, link, HANDLE, PARENTS[direction], _INFO)


def _filter(answer: bytes) -> Filter | None:
    if len(answer) < _TCMSG.size:
        return None
    _, _, handle, _, info = _TCMSG.unpack_from(answer)
    found = attributes.unpack(answer[_TCMSG.size :])
    options = attributes.unpack(found.get(TCA_OPTIONS, b""))
    program = options.get(TCA_BPF_ID, b"")
    return Filter(
        preference=info >> 16,
        handle=handle,
        kind=_text(found.get(TCA_KIND, b"")),
        name=_text(options.get(TCA_BPF_NAME, b"")),
        program=struct.unpack("=I", program)[0] if len(program) == 4 else 0,
    )


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")


def program_id(descriptor: int) -> int:
    """The kernel's number of the program behind a descriptor of ours; 0 if it does not tell."""
    for line in _lines(f"/proc/thread-self/fdinfo/{descriptor}"):
        if line.startswith("prog_id:"):
            return int(line.split()[1])
    return 0


def _lines(path: str) -> Iterator[str]:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            yield from file
    except OSError:
        return
