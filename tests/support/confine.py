"""Run a command with something taken away that no program of util-linux takes away:

    python tests/support/confine.py no-memfd -- COMMAND…      memfd_create ends with ENOSYS, as before Linux 3.17
    python tests/support/confine.py no-wx -- COMMAND…         what MemoryDenyWriteExecute= does on Linux 6.3 and newer

It stays so over exec, for the command and its children. Fails before the command runs if the kernel does not take it away.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import sys

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_SET_MDWE = 22, 38, 65
SECCOMP_MODE_FILTER = 2
MEMFD_CREATE = 319  # x86_64

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, *arguments: int) -> None:
    words = [ctypes.c_ulong(word) for word in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc.prctl(option, *words):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def no_memfd() -> None:
    """A seccomp filter (linux/filter.h): load the number; is it memfd_create? then ENOSYS, else allow."""
    instruction = struct.Struct("=HBBI")
    program = b"".join(
        instruction.pack(*words)
        for words in (
            (0x20, 0, 0, 0),  # BPF_LD | BPF_W | BPF_ABS: seccomp_data.nr
            (0x15, 0, 1, MEMFD_CREATE),  # BPF_JMP | BPF_JEQ | BPF_K
            (0x06, 0, 0, 0x00050000 | errno.ENOSYS),  # BPF_RET: SECCOMP_RET_ERRNO
            (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
        )
    )
    buffer = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: the number of instructions, then a pointer to them.
    described = ctypes.create_string_buffer(struct.pack("@HP", 4, ctypes.addressof(buffer)))
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(described))
    try:
        os.close(os.memfd_create("x"))
    except OSError:
        return
    raise SystemExit("memfd_create is not refused")


def no_wx() -> None:
    _prctl(PR_SET_MDWE, 1)
    try:
        mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return
    raise SystemExit("writable and executable memory is not refused")


if __name__ == "__main__":
    what, dashes, *command = sys.argv[1:]
    assert dashes == "--"
    {"no-memfd": no_memfd, "no-wx": no_wx}[what]()
    os.execvp(command[0], command)
