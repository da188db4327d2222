"""The log as flannel 0.7.1 writes it: glog's lines, and glog's files with `--logtostderr=false --log_dir=…`.

    I1124 21:40:11.250371   11671 daemon.py:431] lease 172.17.41.0/24 again ttl=24.0h
    /var/log/flannel/flanneld.node2.root.log.INFO.20261124-214011.11671      (link: flanneld.INFO)

One file per severity, made when its first line comes; each holds its severity and those above. Ours differ in three
ways: every line is on its way to the disk when it is logged (flanneld's last 30 s are lost when it ends); a directory
that is missing is said, not silently replaced by /tmp; a full disk never ends the agent.
"""

from __future__ import annotations

import os
import pwd
import sys
import time
from typing import TYPE_CHECKING

from flanctl import __version__
from flanctl.agent.log import Log
from flanctl.flanneld_line import SEVERITIES

if TYPE_CHECKING:
    from typing import TextIO

LEVELS = {"info": 0, "ready": 0, "warn": 1, "error": 2}
PROGRAM = "flanneld"
MAX_BYTES = 1800 * 1024 * 1024
"""glog's size of a file, after which it begins the next."""


class Glog(Log):
    """Writes glog's lines to `stream`, to files, or both; safe from any thread; never fails.

    `directory` None means standard error only. `at_least` is the severity from which on a line goes to standard
    error too where files are written.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        directory: str | None = None,
        also_stderr: bool = False,
        at_least: int = 2,
    ) -> None:
        super().__init__(stream, journal=False)
        self._also_stderr = also_stderr
        self._at_least = at_least
        self._directory = directory
        self._files: dict[int, _File] = {}
        self._said = False
        if directory is not None and (why := _unusable(directory)):
            self._directory = None
            self.warn(
                f"no log files: {directory} {why}; logging to standard error",
                **{"try": f"mkdir -p {directory}"},
            )

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _emit(self, level: str, text: str) -> None:
        severity = LEVELS[level]
        line = _line(severity, f"ready {text}" if level == "ready" else text)
        with self._lock:
            written = self._directory is not None and self._to_files(self._directory, severity, line)
            if not written or self._also_stderr or severity >= self._at_least:
                self._to_stderr(line)

    def _to_files(self, directory: str, severity: int, line: str) -> bool:
        """Into its own severity's file and those below. False when one did not take it."""
        try:
            for each in range(severity, -1, -1):
                file = self._files.get(each)
                if file is None or file.size + len(line) > MAX_BYTES:
                    if file is not None:
                        file.close()
                    file = self._files[each] = _File(directory, SEVERITIES[each])
                file.write(line)
        except OSError as error:
            if not self._said:
                self._said = True
                why = _line(
                    1, f"cannot write a log file in {directory}: {error.strerror}; its lines come here"
                )
                self._to_stderr(why)
            return False
        self._said = False
        return True

    def _to_stderr(self, line: str) -> None:
        try:
            self._stream.write(line)
            self._stream.flush()
        except (OSError, ValueError, AttributeError):
            pass


class _File:
    """One file of one severity, with glog's name, link and header. Raises OSError."""

    def __init__(self, directory: str, severity: str) -> None:
        now = time.localtime()
        host, _, _ = os.uname().nodename.partition(".")
        stamp = time.strftime("%Y%m%d-%H%M%S", now)
        name = f"{PROGRAM}.{host}.{_user()}.log.{severity}.{stamp}.{os.getpid()}"
        path = os.path.join(directory, name)
        # The directory may be /tmp: what a stranger put there under our name is never followed or appended to.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._handle = os.open(path, flags, 0o644)
        self._cut = False
        self.size = 0
        _link(directory, f"{PROGRAM}.{severity}", name)
        self.write(
            f"Log file created at: {time.strftime('%Y/%m/%d %H:%M:%S', now)}\n"
            f"Running on machine: {host}\n"
            f"Binary: flanctl {__version__}, {sys.implementation.name} {sys.version.split()[0]} for linux/{os.uname().machine}\n"
            "Log line format: [IWEF]mmdd hh:mm:ss.uuuuuu threadid file:line] msg\n"
        )

    def write(self, text: str) -> None:
        """At once, not buffered. After a disk that was full for the rest of a line, on a line of its own."""
        data = ("\n" if self._cut else "").encode() + text.encode(errors="backslashreplace")
        written = 0
        try:
            while written < len(data):
                written += os.write(self._handle, data[written:])
        finally:
            self.size += written
            if written:
                self._cut = written < len(data)

    def close(self) -> None:
        os.close(self._handle)


def _line(severity: int, text: str) -> str:
    now = time.time()
    stamp = time.strftime("%m%d %H:%M:%S", time.localtime(now))
    return f"{SEVERITIES[severity][0]}{stamp}.{int(now * 1_000_000) % 1_000_000:06d} {os.getpid():7d} {_caller()}] {text}\n"


def _caller() -> str:
    """`daemon.py:431`: the first frame outside of the log's own two modules.

    By the module's name: a frozen executable has no file names worth showing.
    """
    frame = sys._getframe(1)  # noqa: SLF001  what `inspect` would do, without importing it
    while frame.f_globals["__name__"] in {__name__, Log.__module__} and frame.f_back is not None:
        frame = frame.f_back
    return f"{frame.f_globals['__name__'].rpartition('.')[2]}.py:{frame.f_lineno}"


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return "unknownuser"


def _unusable(directory: str) -> str | None:
    """Why no log file can be made there, or None."""
    if not os.path.isdir(directory):
        return "is no directory" if os.path.exists(directory) else "does not exist"
    return None if os.access(directory, os.W_OK | os.X_OK) else "may not be written to"


def _link(directory: str, link: str, name: str) -> None:
    """`flanneld.INFO` → the newest file. As in glog, nobody's work depends on it."""
    path = os.path.join(directory, link)
    try:
        if os.path.islink(path):
            os.unlink(path)
        os.symlink(name, path)
    except OSError:
        pass
