"""What each address of the status API answers, made from the newest snapshot.

/healthz   200 while the loop turns, else 503            is the process of any use? (liveness)
/readyz    200 while packets can flow, else 503          why not, one reason a line, `id: words` (readiness)
/metrics   Prometheus' text format                       metrics.py
/status    JSON                                          snapshot.document; `flanctl status -w json` adds to it
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from flanctl.agent import metrics
from flanctl.agent.snapshot import Now, document, not_ready, stalled
from flanctl.agent.status_api import Answer
from flanctl.text import printable

if TYPE_CHECKING:
    from flanctl.agent.observer import Observer
    from flanctl.clock import Clock

JSON = "application/json"


class Answers:
    """Called with a path, from the API's thread."""

    def __init__(self, observer: Observer, clock: Clock) -> None:
        self._observer = observer
        self._clock = clock

    def __call__(self, path: str) -> Answer:
        snapshot = self._observer.snapshot
        now = Now(self._clock.now(), time.time())
        match path:
            case "/healthz":
                if (silent := stalled(snapshot, now)) is not None:
                    return Answer(503, f"loop-stalled: the loop has not turned for {silent:.0f}s\n")
                return Answer(200, "ok\n")
            case "/readyz":
                reasons = not_ready(snapshot, now)
                lines = "".join(f"{printable(line)}\n" for line in reasons or ("ready",))
                return Answer(503 if reasons else 200, lines)
            case "/metrics":
                observer = self._observer
                text = metrics.render(
                    snapshot,
                    observer.meters,
                    observer.counters(),
                    now,
                    observer.certificates.ends(),
                    peers=observer.peer_traffic(),
                    offloads=observer.offloads(),
                )
                return Answer(200, text, metrics.CONTENT_TYPE)
            case "/status":
                observer = self._observer
                shown = document(
                    snapshot,
                    observer.counters(),
                    now,
                    peers=observer.peer_traffic(),
                    offloads=observer.offloads(),
                )
                return Answer(200, json.dumps(shown, ensure_ascii=False) + "\n", JSON)
            case _:
                return Answer(404, "there are /healthz /readyz /metrics /status\n")
