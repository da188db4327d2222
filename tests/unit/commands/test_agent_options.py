"""What the agent makes of its options, without starting."""

from __future__ import annotations

import pytest

from flanctl.agent.start import _healthz
from flanctl.errors import UsageError
from flanctl.settings import resolve


def healthz(flags=None, environment=None, files=()):
    return _healthz(resolve(flags or {}, environment=environment or {}, sysconfig_files=files))


def test_without_a_port_nothing_listens():
    assert healthz() is None
    assert healthz({"healthz_ip": "10.0.0.1"}) is None
    assert healthz({"healthz_port": "0"}) is None


def test_flannelds_flags_and_variables_mean_the_same(tmp_path):
    assert healthz({"healthz_port": "10248"}) == ("0.0.0.0", 10248)
    assert healthz(environment={"FLANNELD_HEALTHZ_PORT": "10248", "FLANNELD_HEALTHZ_IP": "127.0.0.1"}) == (
        "127.0.0.1",
        10248,
    )
    file = tmp_path / "flanneld"
    file.write_text('FLANNEL_OPTIONS="-healthz-port=10248 -healthz-ip 10.0.0.1"\n')
    assert healthz(files=[file]) == ("10.0.0.1", 10248)


@pytest.mark.parametrize(
    "flags",
    [
        {"healthz_port": "-1"}, {"healthz_port": "65536"}, {"healthz_port": "http"}, {"healthz_ip": "localhost"},
        {"healthz_ip": "::1"}, {"healthz_ip": "1.2.3.4.5"}, {"healthz_ip": "1.2.3.4:80"},
    ],
)  # fmt: skip
def test_nonsense_is_named_with_its_source(flags):
    with pytest.raises(UsageError, match=r"healthz-(port|ip).*\(from --healthz"):
        healthz({"healthz_port": "10248", **flags})
