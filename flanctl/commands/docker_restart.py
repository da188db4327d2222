"""Docker is told when its options changed, and only then."""

from __future__ import annotations

from pathlib import Path

from flanctl.commands import output


def differs(path: str, content: str) -> bool:
    """Whether the file holds something else, or is not there."""
    try:
        return Path(path).read_bytes() != content.encode()
    except OSError:
        return True  # why, is said when it is written


def restart(service: str) -> None:
    """Have systemd restart a unit that runs. A failure is said and decides nothing: we may be part of a unit's start.

    Not waited for: docker.service starts after the unit whose ExecStartPost= we are.
    """
    import subprocess

    command = ["systemctl", "--no-block", "try-restart", service]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
        )
        why = done.stderr.strip() if done.returncode != 0 else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    if why:
        output.warning(f"the options changed and {service} was not restarted: {why}")
    else:
        output.note(f"the options changed: {service} is restarted, if it runs")
