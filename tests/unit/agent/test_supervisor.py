"""A worker's end is never silent."""

from __future__ import annotations

import queue
import threading

from flanctl.agent.supervisor import Crew, WorkerFailed


def test_a_failing_worker_is_reported_with_its_error():
    inbox = queue.SimpleQueue()
    crew = Crew(inbox.put)
    boom = ValueError("boom")

    def run():
        raise boom

    crew.start("peer watch", run, lambda: None)
    assert inbox.get(timeout=5) == WorkerFailed("peer watch", boom)
    assert crew.stop(seconds=5) == ()


def test_a_worker_that_ends_unasked_is_reported_too():
    inbox = queue.SimpleQueue()
    crew = Crew(inbox.put)
    crew.start("keeper", lambda: None, lambda: None)
    assert inbox.get(timeout=5) == WorkerFailed("keeper", None)
    crew.stop(seconds=5)


def test_stop_ends_all_and_names_who_is_late():
    inbox, end = queue.SimpleQueue(), threading.Event()
    crew = Crew(inbox.put)
    good = threading.Event()
    crew.start("good", lambda: good.wait() and None, good.set)
    crew.start("deaf", lambda: end.wait() and None, lambda: None)
    assert crew.stop(seconds=0.2) == ("deaf",)
    assert crew.stop(seconds=0.2) == ()
    end.set()
    assert inbox.empty()


def test_starting_and_stopping_a_hundred_times_leaves_no_thread():
    before = threading.active_count()
    for _ in range(100):
        crew, stop = Crew(lambda _: None), threading.Event()
        crew.start("one", lambda stop=stop: stop.wait() and None, stop.set)
        assert crew.stop(seconds=5) == ()
    assert threading.active_count() <= before
