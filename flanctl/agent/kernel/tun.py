"""Opening a TUN: a descriptor that carries bare IP packets.

Constants and behaviour from Linux include/uapi/linux/if_tun.h and drivers/net/tun.c. The flags trap (a process that
attaches with other flags than it believes misreads every packet) is firezone/firezone pull request 14630: we read
the flags back and refuse.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

from flanctl.errors import Conflict, FlanctlError, Invalid, NotPermitted

DEVICE = "/dev/net/tun"
TUNSETIFF = 0x400454CA
TUNSETPERSIST = 0x400454CB
TUNGETIFF = 0x800454D2
TUNSETVNETHDRSZ = 0x400454D8
IFF_TUN = 0x0001
IFF_MULTI_QUEUE = 0x0100
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
VNET_HDR_BYTES = 10
"""`struct virtio_net_hdr` without num_buffers."""

_IFREQ = struct.Struct("16sH22x")
_LAYOUT = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE | 0x0002  # 0x0002 is IFF_TAP


def open_tun(name: str, *, vnet_hdr: bool = False, persistent: bool = True, device: str = DEVICE) -> int:
    """Make the TUN `name`, or attach to it if it is there. The caller closes the descriptor.

    Non-blocking and close-on-exec. With `vnet_hdr` each packet has a 10-byte virtio header before it. A device that
    is not `persistent` goes with its last descriptor; attaching to a persistent one never makes it transient.

    Raises Conflict when another process holds the device or it is no TUN, NotPermitted without CAP_NET_ADMIN or
    without access to /dev/net/tun, Invalid for a name no interface can have, FlanctlError when there is no TUN here.
    """
    raw = name.encode()
    if not 0 < len(raw) < 16 or b"/" in raw or b"%" in raw or raw.split() != [raw] or raw in {b".", b".."}:
        raise Invalid(f'"{name}" cannot be the name of an interface (1 to 15 bytes, no space, "/" or "%")')
    flags = IFF_TUN | IFF_NO_PI | (IFF_VNET_HDR if vnet_hdr else 0)
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _no_device(name, device, error) from None
    try:
        try:
            fcntl.ioctl(fd, TUNSETIFF, _IFREQ.pack(raw, flags))
        except OSError as error:
            raise _refused(name, error) from None
        actual = _IFREQ.unpack(fcntl.ioctl(fd, TUNGETIFF, bytes(_IFREQ.size)))[1] & _LAYOUT
        if actual != flags:
            raise Conflict(
                f"{name} exists with flags {actual:#x} where {flags:#x} are needed",
                hint=f"ip link delete {name}",
                id="device-foreign",
            )
        if vnet_hdr:
            fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", VNET_HDR_BYTES))
        if persistent:
            keep_tun(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def keep_tun(fd: int) -> None:
    """From now on the device outlives its last descriptor. Raises FlanctlError."""
    try:
        fcntl.ioctl(fd, TUNSETPERSIST, 1)
    except OSError as error:
        raise FlanctlError(f"cannot make the TUN persistent: {error.strerror}") from None


def holders(name: str, *, proc: Path = Path("/proc")) -> tuple[str, ...]:
    """Other processes of our network namespace that hold the TUN `name`: `flanneld (pid 4711)`.

    The kernel shows a descriptor's device in /proc/PID/fdinfo/FD, after `iff:` and a tab. Only root sees them all.
    """
    found = []
    ours = _link(proc / "thread-self" / "ns" / "net")
    for process in proc.iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            if _link(process / "ns" / "net") != ours:
                continue
            for fd in (process / "fd").iterdir():
                if (
                    _link(fd).endswith("/net/tun")
                    and f"iff:\t{name}\n" in (process / "fdinfo" / fd.name).read_text()
                ):
                    command = (process / "comm").read_text().strip()
                    found.append(f"{command} (pid {process.name})")
                    break
        except OSError:
            continue  # it ended meanwhile, or is not ours to see
    return tuple(found)


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


def _no_device(name: str, device: str, error: OSError) -> FlanctlError:
    if error.errno in {errno.EACCES, errno.EPERM}:
        return NotPermitted(f"cannot open {device} for {name}: {error.strerror}", hint="run as root")
    hint = None
    if error.errno in {errno.ENOENT, errno.ENODEV, errno.ENXIO}:
        hint = "modprobe tun; in a container, pass --device /dev/net/tun"
    return FlanctlError(f"cannot open {device} for {name}: {error.strerror}", hint=hint, id="no-tun")


def _refused(name: str, error: OSError) -> FlanctlError:
    if error.errno == errno.EBUSY:
        who = ", ".join(holders(name)) or "another process"
        return Conflict(f"{name} is held by {who}", hint="stop that process first", id="device-busy")
    if error.errno in {errno.EPERM, errno.EACCES}:
        return NotPermitted(
            f"cannot make or attach to {name}: {error.strerror}", hint="run as root, or with CAP_NET_ADMIN"
        )
    if error.errno == errno.EINVAL:
        return Conflict(
            f"{name} exists and is not a TUN like ours", hint=f"ip link delete {name}", id="device-foreign"
        )
    return FlanctlError(f"cannot make {name}: {error.strerror}")
