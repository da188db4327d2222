"""The agent's log: a sentence, then `key=value`, one line each, to stderr.

    log.info("peer added", subnet=peer.subnet, public_ip=peer.public_ip)
    → 2026-11-24T21:40:11.250Z info  peer added subnet=172.17.90.0/24 public-ip=192.168.6.9

Under systemd the journal keeps the time and wants the level as `<N>` in front (sd-daemon(3)). Field names are a
promise once printed by the `ready` line. No secret is ever passed in here.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from flanctl.text import printable

if TYPE_CHECKING:
    from typing import TextIO

    from flanctl.clock import Clock

_PRIORITY = {"error": 3, "warn": 4, "ready": 5, "info": 6}
# When something goes on failing: at once, after a minute, ten, then every hour.
_REPEAT_AFTER = (0.0, 60.0, 600.0, 3600.0)
MINUTE = 60.0


class Log:
    """Writes lines; safe from any thread; a closed or full stderr never stops the agent."""

    def __init__(self, stream: TextIO | None = None, *, journal: bool | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._journal = _is_journal(self._stream) if journal is None else journal
        self._lock = threading.Lock()

    def info(self, sentence: str, **fields: object) -> None:
        self._write("info", sentence, fields)

    def warn(self, sentence: str, **fields: object) -> None:
        self._write("warn", sentence, fields)

    def error(self, sentence: str, **fields: object) -> None:
        self._write("error", sentence, fields)

    def ready(self, **fields: object) -> str:
        """The one line an operator pastes into a question; returned without its prefix for STATUS=."""
        text = _fields(fields)
        self._write("ready", text, {})
        return text

    def _write(self, level: str, sentence: str, fields: dict[str, object]) -> None:
        text = " ".join(filter(None, (sentence, _fields(fields))))
        self._emit(level, text)

    def _emit(self, level: str, text: str) -> None:
        """Write one line; `compat/glog.py` has another form for it."""
        if self._journal:
            line = f"<{_PRIORITY[level]}>{'ready ' if level == 'ready' else ''}{text}\n"
        else:
            now = time.time()
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
            line = f"{stamp}.{int(now * 1000) % 1000:03d}Z {level:<5} {text}\n"
        with self._lock:
            try:
                self._stream.write(line)
                self._stream.flush()
            except (OSError, ValueError):
                pass


class Repeated:
    """Says a lasting trouble at once, after 1 min, 10 min and each hour, or `every` so many seconds; not at each try."""

    def __init__(self, clock: Clock, *, every: float | None = None) -> None:
        self._clock = clock
        self._every = every
        self._since: dict[str, tuple[float, int, int]] = {}

    def worth_saying(self, what: str) -> int | None:
        """How often it has happened, if it is time to say so again, else None."""
        now = self._clock.now()
        since, count, said = self._since.get(what, (now, 0, 0))
        count += 1
        if self._every is not None:
            due = said * self._every
        else:
            due = _REPEAT_AFTER[said] if said < len(_REPEAT_AFTER) else (said - 2) * 3600.0
        say = now - since >= due
        self._since[what] = (since, count, said + say)
        return count if say else None

    def over(self, what: str) -> float | None:
        """Forget it; for how many seconds it lasted, None if it was not going on."""
        entry = self._since.pop(what, None)
        return None if entry is None else self._clock.now() - entry[0]


def _is_journal(stream: TextIO) -> bool:
    """systemd.exec(5): JOURNAL_STREAM names device and inode of the journal's stream.

    Children inherit the variable, also where their stderr is something else.
    """
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _fields(fields: dict[str, object]) -> str:
    return " ".join(f"{name.replace('_', '-')}={_quoted(str(value))}" for name, value in fields.items())


def _quoted(text: str) -> str:
    """Values from the network must not fake a field or a line."""
    clean = printable(text)
    if clean and not any(char in clean for char in ' "='):
        return clean
    return '"' + clean.replace('"', '\\"') + '"'
