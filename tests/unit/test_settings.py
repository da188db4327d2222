"""Where settings come from, and in what order."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from flanctl.errors import NotPermitted, UsageError
from flanctl.settings import OPTIONS, PASSWORD, TABLE, resolve

NOTE = """\
# Flanneld configuration options

# etcd url location.  Point this to the server where etcd runs
FLANNEL_ETCD_ENDPOINTS="http://192.168.6.15:2379,http://192.168.6.2:2379,http://192.168.6.5:2379"

# etcd config key.  This is the configuration key that flannel queries
# For address range assignment
FLANNEL_ETCD_PREFIX="/jxdd/other"

# Any additional options that you want to pass
FLANNEL_OPTIONS="--logtostderr=false --log_dir=/var/log/flannel/  --iface=eth0"
"""


def settings(flags=None, env=None, toml=Path("/nonexistent"), sysconfig=()):
    return resolve(flags or {}, environment=env or {}, toml_file=toml, sysconfig_files=sysconfig)


def test_a_host_that_runs_flannel_needs_no_flag(tmp_path):
    """The deployment note's sysconfig file gives endpoints, prefix and interface, each with its line."""
    file = tmp_path / "flanneld"
    file.write_text(NOTE)
    found = settings(sysconfig=[file])
    assert found.items("endpoints") == (
        "http://192.168.6.15:2379",
        "http://192.168.6.2:2379",
        "http://192.168.6.5:2379",
    )
    assert found.text("prefix") == "/jxdd/other"
    assert found.items("iface") == ("eth0",)
    assert found.source("endpoints") == f"FLANNEL_ETCD_ENDPOINTS in {file}:4"
    assert found.source("iface") == f"FLANNEL_OPTIONS in {file}:11"


def _sources(row):
    """Every place that can set it, strongest first."""
    files = [
        (file, name) for file in FILES for name in ((OPTIONS,) if row.flanneld else ()) + row.variables()
    ]
    return [("flag", row.flag), *(("variable", name) for name in row.variables()), ("toml", row.name), *files]


FILES = ("sysconfig", "default")


@given(st.data())
@hypothesis_settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None
)
def test_of_all_places_that_set_a_setting_the_strongest_counts(tmp_path, data):
    """flag, FLANCTL_*, FLANNELD_*, FLANNEL_*, ETCDCTL_*, TOML, sysconfig's flags, its variables, the next file, default."""
    row = data.draw(st.sampled_from(list(TABLE.values())))
    sources = _sources(row)
    used = data.draw(st.lists(st.sampled_from(range(len(sources))), unique=True).map(sorted))
    empty = data.draw(st.sets(st.sampled_from(range(len(sources)))))
    flags, env, toml, files = {}, {}, "", {file: [] for file in FILES}
    told = []
    for number in used:
        place, name = sources[number]
        unset = number in empty and place != "flag" and name not in {row.name, OPTIONS}
        text = "" if unset else f"v{number:02}"
        if place == "flag":
            flags[row.name] = text
        elif place == "variable":
            env[name] = text
        elif place == "toml":
            toml = f"# a comment\n{data.draw(st.sampled_from([row.name, row.name.replace('_', '-')]))} = '{text}'\n"
        elif name == OPTIONS:
            files[place].append(f'{OPTIONS}="-v=0 -{row.flanneld}={text} --nosuch x"')
        else:
            files[place].append(f"{name}={text}")
        if not unset:
            told.append((text, place, name))
    (tmp_path / "flanctl.toml").write_text(toml)
    paths = []
    for file, lines in files.items():
        paths.append(tmp_path / file)
        paths[-1].write_text("\n".join(data.draw(st.permutations(lines))))
    found = settings(flags, env, tmp_path / "flanctl.toml", paths).values.get(row.name)
    if told:
        text, place, name = told[0]
        assert found.text == text
        if place == "toml":
            assert found.source.replace("-", "_") == f"{row.name} in {tmp_path}/flanctl.toml:2".replace(
                "-", "_"
            )
        elif place in FILES:
            line = next(
                n for n, each in enumerate((tmp_path / place).read_text().split("\n"), 1) if text in each
            )
            assert found.source == f"{name} in {tmp_path / place}:{line}"
        else:
            assert found.source == name
    elif row.default is None:
        assert found is None
    else:
        assert (found.text, found.source) == (row.default, "default")


def test_a_pattern_may_hold_a_comma():
    found = settings(flags={"iface_regex": "^19{1,3}2\\.\n^eth[0-9]"}, env={"FLANCTL_IFACE": "eth0, eth1"})
    assert found.items("iface_regex") == ("^19{1,3}2\\.", "^eth[0-9]")
    assert found.items("iface") == ("eth0", "eth1")


def test_a_file_that_may_not_be_read_is_an_error_and_never_passed_over(tmp_path):
    """Else a command would ask, and write to, another registry than the operator configured."""
    (tmp_path / "dir").mkdir()
    with pytest.raises(NotPermitted, match="cannot read settings from"):
        settings(toml=tmp_path / "dir")
    with pytest.raises(NotPermitted, match="cannot read settings from"):
        settings(sysconfig=[tmp_path / "dir"])


def test_an_empty_variable_counts_as_unset():
    assert settings(env={"FLANCTL_PREFIX": ""}).text("prefix") == "/jxdd/network"


def test_flags_inside_flannel_options_are_read_in_gos_grammar(tmp_path):
    file = tmp_path / "flanneld"
    file.write_text(
        "FLANNEL_OPTIONS='-ip-masq -iface eth1 --iface=eth2 -v=3 --public-ip 10.1.2.3 word --iface=no'\n"
    )
    found = settings(sysconfig=[file])
    assert found.switch("ip_masq")
    assert found.items("iface") == ("eth1", "eth2")
    assert found.text("public_ip") == "10.1.2.3"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 5.0), ("2.5", 2.5), ("500ms", 0.5), ("2m", 120.0), ("1h", 3600.0), ("7S", 7.0)],
)
def test_durations(text, seconds):
    assert settings(flags={"timeout": text}).seconds("timeout") == seconds


@pytest.mark.parametrize("text", ["", "-1", "0", "five", "1d", "nan", "inf", "1e99"])
def test_a_bad_duration_is_named_with_its_source(text):
    with pytest.raises(UsageError, match=r"--timeout .* \(from --timeout\) is not a duration"):
        settings(flags={"timeout": text}).seconds("timeout")


def test_a_switch_that_is_neither_is_an_error():
    with pytest.raises(UsageError, match="true or false"):
        settings(env={"FLANNELD_IP_MASQ": "maybe"}).switch("ip_masq")


def test_an_unknown_name_in_the_toml_file_is_an_error(tmp_path):
    toml = tmp_path / "flanctl.toml"
    toml.write_text('endpoint = "http://a:2379"\n')
    with pytest.raises(UsageError, match='unknown setting "endpoint"'):
        settings(toml=toml)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("endpoints = [\n", r"flanctl\.toml: .*\(at "),
        ('prefix = "/a"\n\nprefix = "/b"\n', r"flanctl\.toml: .*\(at line 3, "),
        (
            'prefix = "/a"\nendpiont = "x"\n',
            r'flanctl\.toml:2: unknown setting "endpiont"; did you mean endpoints\?',
        ),
        ('prefix = "/a"\n[registry]\nprefix = 1\n', r'flanctl\.toml:2: unknown setting "registry"'),
        ("[prefix]\na = 1\n", r"flanctl\.toml:1: prefix takes one value or a list of them, not a table"),
        ("timeout = 5\ncert.x = 1\n", r"flanctl\.toml:2: cert takes one value"),
        (b'prefix = "/a"\ncert = "\xff"\n', r"flanctl\.toml:2: it is not UTF-8"),
    ],
)
def test_a_broken_toml_file_is_an_error_with_its_line(tmp_path, content, says):
    toml = tmp_path / "flanctl.toml"
    toml.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=says):
        settings(toml=toml)


def test_a_toml_value_is_found_with_its_line_and_means_what_a_flag_would(tmp_path):
    toml = tmp_path / "flanctl.toml"
    toml.write_text(
        'cacert = """\nprefix = "no"\n"""\niface-regex = ["^eth[0-9]{1,2}", "^en"]\n'
        '"prefix" = "/yes"\nip_masq = true\nendpoints = ["http://a:1", "http://b:1"]\ntimeout = 2.5\n'
    )
    found = settings(toml=toml)
    assert found.source("prefix") == f"prefix in {toml}:5"
    assert found.items("iface_regex") == ("^eth[0-9]{1,2}", "^en")
    assert found.source("iface_regex") == f"iface-regex in {toml}:4"
    assert found.items("endpoints") == ("http://a:1", "http://b:1")
    assert found.switch("ip_masq")
    assert found.seconds("timeout") == 2.5


def test_a_password_is_never_shown_and_has_no_flag():
    found = settings(env={"FLANCTL_PASSWORD": "geheim"})
    assert found.text("password") == "geheim"
    with pytest.raises(UsageError) as error:
        found.switch("password")
    assert "geheim" not in str(error.value)
    assert PASSWORD.secret


@given(st.text(max_size=400))
def test_no_sysconfig_file_is_more_than_a_usage_error_that_names_it(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("s") / "flanneld"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        settings(sysconfig=[file])
    except UsageError as error:
        assert str(file) in str(error)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'A=1\nFLANNEL_ETCD_PREFIX="/jxdd\nB=2\n', ":2: the quote of FLANNEL_ETCD_PREFIX is never closed"),
        (b"# x\nA=\0\n", ":2: it holds a NUL byte"),
        (NOTE.encode("utf-16"), ": it is UTF-16, not UTF-8"),
        (b"FLANNEL_ETCD_PREFIX=/\xff\n", ":1: it is not UTF-8"),
    ],
)
def test_a_broken_sysconfig_file_is_named_with_its_line(tmp_path, content, says):
    """Passing over it would ask, and write to, another registry than the operator configured."""
    file = tmp_path / "flanneld"
    file.write_bytes(content)
    with pytest.raises(UsageError) as error:
        settings(sysconfig=[file])
    assert f"{file}{says}" in str(error.value)
    assert error.value.hint == f"flanctl config check {file}"


def test_a_sysconfig_file_with_windows_line_ends_is_read_as_systemd_reads_it(tmp_path):
    file = tmp_path / "flanneld"
    file.write_bytes(NOTE.replace("\n", "\r\n").encode())
    assert settings(sysconfig=[file]).text("prefix") == "/jxdd/other"


def test_among_a_files_variables_the_newer_name_wins_as_in_flanneld_start(tmp_path):
    file = tmp_path / "flanneld"
    file.write_text("FLANNEL_ETCD_PREFIX=/new\nFLANNEL_ETCD_KEY=/old\nFLANNEL_ETCD=http://old:1\n")
    found = settings(sysconfig=[file])
    assert (found.text("prefix"), found.text("endpoints")) == ("/new", "http://old:1")


def test_every_flannel_flag_has_its_variable():
    for row in TABLE.values():
        if row.flanneld:
            assert "FLANNELD_" + row.flanneld.upper().replace("-", "_") in row.variables()


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.default is not None])
def test_an_empty_value_where_there_must_be_one_is_named(name):
    """An empty path is the current directory to the kernel, an empty switch was neither."""
    found = settings(flags={name: ""})
    if TABLE[name].kind == "text":
        assert found.optional(name) is None  # endpoints, prefix: their users refuse it
    else:
        with pytest.raises(UsageError, match=f'{TABLE[name].flag} "" \\(from {TABLE[name].flag}\\) is not '):
            found.check(name)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.default is None])
def test_an_empty_value_of_what_has_no_default_counts_as_not_given(name):
    found = settings(flags={name: ""})
    found.check(name)
    assert found.optional(name) is None
    assert found.items(name) == ()
