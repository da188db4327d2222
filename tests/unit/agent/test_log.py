"""What the agent's log looks like, and what it never does."""

from __future__ import annotations

import io

from flanctl.agent.log import Log, Repeated
from tests.support.clock import FakeClock


def line(journal=False, level="info", sentence="s", **fields):
    stream = io.StringIO()
    getattr(Log(stream, journal=journal), level)(sentence, **fields)
    return stream.getvalue()


def test_a_line_is_time_level_sentence_fields():
    text = line(sentence="peer added", subnet="172.17.90.0/24", public_ip="192.168.6.9")
    assert text.endswith("Z info  peer added subnet=172.17.90.0/24 public-ip=192.168.6.9\n")


def test_the_journal_gets_a_priority_and_no_time():
    assert line(journal=True, level="error", sentence="lease lost", id="x") == "<3>lease lost id=x\n"


def test_values_from_the_network_cannot_fake_a_line_or_field():
    text = line(error='a b\n2026 error fake="1"\x1b[31m')
    assert text.count("\n") == 1
    assert "\x1b" not in text
    assert 'error="a b\\x0a2026 error fake=\\"1\\"\\x1b[31m"' in text


def test_a_closed_stream_does_not_stop_the_agent():
    stream = io.StringIO()
    stream.close()
    Log(stream).info("nobody hears this")


def test_the_ready_line_is_returned_for_systemd():
    stream = io.StringIO()
    assert Log(stream, journal=False).ready(mtu=1472, peers=3) == "mtu=1472 peers=3"
    assert stream.getvalue().endswith(" ready mtu=1472 peers=3\n")


def test_a_lasting_trouble_is_said_at_once_after_a_minute_ten_and_every_hour():
    clock = FakeClock()
    repeated, said = Repeated(clock), []
    start = clock.now()
    while clock.now() - start <= 3 * 3600:
        if repeated.worth_saying("etcd"):
            said.append(round(clock.now() - start))
        clock.advance(5.0)
    assert said == [0, 60, 600, 3600, 7200, 10800]
    assert repeated.over("etcd") is not None
    assert repeated.over("etcd") is None
    assert repeated.worth_saying("etcd") == 1


def test_flanneld_says_it_every_minute():
    clock = FakeClock()
    repeated, said = Repeated(clock, every=60.0), []
    start = clock.now()
    while clock.now() - start <= 200:
        if repeated.worth_saying("etcd"):
            said.append(round(clock.now() - start))
        clock.advance(5.0)
    assert said == [0, 60, 120, 180]
