"""What this host remembers of itself: its subnet over a reboot (`state`), the network over an outage (`known`).

A disk that fails must not keep packets from flowing: subnet.env and the registry remember our subnet too. So what
cannot be read is made anew, what cannot be written is a problem that status shows, and neither ends the agent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flanctl.agent import known as known_file
from flanctl.agent import state as state_file
from flanctl.errors import FlanctlError, Invalid
from flanctl.model.peers import Problem
from flanctl.model.subnet_file import SubnetFile

if TYPE_CHECKING:
    from ipaddress import IPv4Network
    from pathlib import Path

    from flanctl.agent.known import Known
    from flanctl.agent.log import Log
    from flanctl.agent.problems import Problems
    from flanctl.agent.state import State


class Memory:
    """The state directory and subnet.env of one host."""

    def __init__(self, state_dir: Path, subnet_file: Path, log: Log, problems: Problems) -> None:
        self._state_dir = state_dir
        self._subnet_file = subnet_file
        self._log = log
        self._problems = problems

    @property
    def files(self) -> tuple[Path, ...]:
        """All that is ever written, subnet.env included."""
        return self._subnet_file, self._state_dir / state_file.FILE, self._state_dir / known_file.FILE

    def state(self) -> State | None:
        """Our state file; None where there is none, or one that cannot be read (said): it is made anew then, from
        subnet.env and what the registry has in our name.
        """
        try:
            return state_file.load(self._state_dir)
        except FlanctlError as error:
            self._log.warn(f"{error.message}; starting a new one", id="bad-state")
            return None

    def save_state(self, state: State) -> None:
        """Remember our subnet."""
        try:
            state_file.save(self._state_dir, state)
        except FlanctlError as error:
            words = f"our subnet is not remembered over a reboot: {error.message}"
            self._problems.note("state", (Problem("bad-state", None, words),))

    def subnets(self, state: State, prefix: str) -> list[IPv4Network]:
        """Subnets we had, the surest memory first. /run is empty after a reboot, a state directory is not."""
        previous = []
        if state.prefix == prefix and state.subnet is not None:
            previous.append(state.subnet)
        try:
            previous.append(SubnetFile.parse(self._subnet_file.read_bytes()).subnet)
        except OSError:
            pass
        except Invalid as error:
            self._log.warn(f"{self._subnet_file} is not used: {error.message}")
        return previous

    def known(self) -> Known | None:
        """What we knew last, of whatever network. Raises Invalid for a file that cannot be read."""
        return known_file.load(self._state_dir)

    def save_known(self, known: Known) -> None:
        """For whoever is started after us while the registry is silent."""
        try:
            known_file.save(self._state_dir, known)
        except FlanctlError as error:
            words = f"a restart during an outage will have to wait for the registry: {error.message}"
            self._problems.note("known", (Problem("bad-state", None, words),))
        else:
            self._problems.note("known", ())

    def forget_known(self) -> None:
        """Our subnet is another host's."""
        known_file.forget(self._state_dir)
