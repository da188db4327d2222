"""The netlink door: what it costs to import, and dumps that change under us."""

from __future__ import annotations

import struct
import subprocess
import sys

import pytest

from flanctl.agent.kernel.netlink import (
    NLM_F_DUMP_INTR,
    NLMSG_DONE,
    NLMSG_ERROR,
    RTM_NEWADDR,
    NetlinkKernel,
    ifaddrmsg,
)
from flanctl.errors import FlanctlError


class Script:
    """A socket that gives prepared answers to each request in turn; the last one repeats."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)
        self.asked = 0

    def send(self, data: bytes) -> None:
        self.asked += 1
        (self.sequence,) = struct.unpack_from("=I", data, 8)

    def recv(self, size: int) -> bytes:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        fixed, offset = bytearray(answer), 0
        while offset < len(fixed):
            (length,) = struct.unpack_from("=I", fixed, offset)
            if struct.unpack_from("=I", fixed, offset + 8)[0] == 0:
                struct.pack_into("=I", fixed, offset + 8, self.sequence)
            offset += (length + 3) & ~3
        return bytes(fixed)

    def close(self) -> None:
        pass


def message(kind: int, flags: int = 2, body: bytes = b"", sequence: int = 0) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body


def address(text: str, flags: int = 2, sequence: int = 0) -> bytes:
    made = ifaddrmsg()
    made["family"], made["prefixlen"], made["index"] = 2, 24, 3
    made["attrs"] = [["IFA_LOCAL", text]]
    made["header"] = {"type": RTM_NEWADDR, "flags": flags, "sequence_number": sequence}
    made.encode()
    return bytes(made.data)


DONE = message(NLMSG_DONE, body=bytes(4))


@pytest.fixture
def kernel() -> NetlinkKernel:
    kernel = NetlinkKernel()
    kernel.close()
    return kernel


def answer(kernel: NetlinkKernel, *answers: bytes) -> Script:
    script = Script(*answers)
    kernel._socket = script  # type: ignore[assignment]
    return script


def test_a_dump_that_was_interrupted_is_asked_again(kernel: NetlinkKernel) -> None:
    half = address("192.0.2.1", flags=2 | NLM_F_DUMP_INTR) + DONE
    script = answer(kernel, half, half, address("192.0.2.2") + DONE)
    assert [str(found) for found in kernel._addresses()[3]] == ["192.0.2.2/24"]
    assert script.asked == 3


def test_an_interruption_said_only_at_the_end_counts(kernel: NetlinkKernel) -> None:
    late = address("192.0.2.1") + message(NLMSG_DONE, 2 | NLM_F_DUMP_INTR, bytes(4))
    script = answer(kernel, late, address("192.0.2.2") + DONE)
    assert [str(found) for found in kernel._addresses()[3]] == ["192.0.2.2/24"]
    assert script.asked == 2


def test_a_dump_that_never_holds_still_is_an_error(kernel: NetlinkKernel) -> None:
    answer(kernel, address("192.0.2.1", flags=2 | NLM_F_DUMP_INTR) + DONE)
    with pytest.raises(FlanctlError, match="cannot list the addresses: it changed 20 times"):
        kernel._addresses()


def test_answers_to_an_older_question_are_passed_over(kernel: NetlinkKernel) -> None:
    stale = address("203.0.113.1", sequence=999) + message(NLMSG_DONE, body=bytes(4), sequence=999)
    answer(kernel, stale, address("192.0.2.2") + DONE)
    assert [str(found) for found in kernel._addresses()[3]] == ["192.0.2.2/24"]


def test_a_dump_may_come_in_many_datagrams(kernel: NetlinkKernel) -> None:
    answer(kernel, address("192.0.2.1"), address("192.0.2.2"), DONE)
    assert [str(found) for found in kernel._addresses()[3]] == ["192.0.2.1/24", "192.0.2.2/24"]


def test_the_kernels_sentence_is_kept(kernel: NetlinkKernel) -> None:
    text = b"mtu greater than device maximum.\0"
    words = struct.pack("=HH", 4 + len(text), 1) + text
    body = struct.pack("=i", -22) + message(16) + words
    answer(kernel, message(NLMSG_ERROR, 0x100 | 0x200, body))
    with pytest.raises(FlanctlError) as error:
        kernel.set_link("flannel0", mtu=70000)
    assert (
        str(error.value)
        == "cannot set mtu 70000 on flannel0: Invalid argument (mtu greater than device maximum)"
    )


def test_importing_it_loads_neither_asyncio_nor_the_rest_of_pyroute2() -> None:
    code = (
        "import sys, flanctl.agent.kernel.netlink\n"
        "print('asyncio' in sys.modules, sum(m.startswith('pyroute2') for m in sys.modules) < 60)\n"
        "import pyroute2; print(pyroute2.IPRoute.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "IPRoute"]
