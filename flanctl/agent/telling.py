"""What the agent's log says of peers and of time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flanctl.agent.problems import MANY_CHANGES

if TYPE_CHECKING:
    from flanctl.agent.log import Log
    from flanctl.errors import FlanctlError
    from flanctl.model.peers import Peer


def tell_changes(log: Log, before: tuple[Peer, ...], after: tuple[Peer, ...], revision: int) -> None:
    """A line for each change, or one for all when there are many."""
    # By identity first (peers_of's memo): to hash ten thousand peers at each event takes longer than all the rest.
    there, were = set(map(id, after)), set(map(id, before))
    left = {peer for peer in before if id(peer) not in there}
    came = {peer for peer in after if id(peer) not in were}
    gone, new = left - came, came - left
    if len(gone) + len(new) > MANY_CHANGES:
        log.info("peers changed", added=len(new), removed=len(gone), revision=revision, peers=len(after))
        return
    for words, peers in (("peer removed", gone), ("peer added", new)):
        for peer in sorted(peers, key=lambda peer: peer.subnet):
            log.info(
                words,
                subnet=peer.subnet,
                public_ip=peer.public_ip,
                revision=revision,
                peers=len(after),
            )


def hours(seconds: float | None) -> str:
    """A lease's time, as the log writes it."""
    if seconds is None:
        return "never-ends"
    return f"{seconds / 3600:.1f}h"


def hint(error: FlanctlError) -> dict[str, str]:
    """The next step as a field of a log line, where there is one."""
    return {"try": error.hint} if error.hint else {}
