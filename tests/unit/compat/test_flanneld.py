"""flanneld's command line: flags, variables, refusals, exit codes (flannel.md 1.1 to 1.4)."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from flanctl.compat import flanneld, flanneld_start
from flanctl.errors import UsageError
from flanctl.flanneld_flags import FLAGS, Fate
from flanctl.flanneld_line import CommandLine, parse, read_environment, refuse
from flanctl.settings import TABLE
from tests.support.cli import program

if TYPE_CHECKING:
    from collections.abc import Mapping

PAGES = (Path("docs/from-flannel.md"), Path("docs/from-flannel.zh-CN.md"))


def given_by(*words: str, env: Mapping[str, str] | None = None) -> CommandLine:
    line = parse(words)
    read_environment(line, env or {})
    refuse(line)
    return line


def settings_by(*words: str, env: Mapping[str, str] | None = None):
    env = env or {}
    return flanneld.settings(given_by(*words, env=env), environment=env)


def run(name: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*program(name), *words],
        env={"PATH": os.environ["PATH"], **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    return done


# ---- the table ------------------------------------------------------------------------------------------------------


def test_every_flag_of_ours_that_bears_flannels_name_is_kept_and_the_other_way_round() -> None:
    ours = {row.flanneld for row in TABLE.values() if row.flanneld is not None}
    program_flags = {"version", "help", "logtostderr", "alsologtostderr", "stderrthreshold", "log_dir"}
    assert {flag.name for flag in FLAGS.values() if flag.fate is Fate.KEPT} == ours | program_flags


def test_switches_lists_and_numbers_are_the_same_in_both_tables() -> None:
    kinds = {"switch": "bool", "list": "list", "patterns": "list", "number": "int", "seconds": "int"}
    for row in TABLE.values():
        if row.flanneld is not None and row.name != "endpoints":
            assert FLAGS[row.flanneld].kind == kinds.get(row.kind, "string"), row.name


def test_defaults_are_flannels() -> None:
    """Where the two programs' defaults differ it is written down, once."""
    for row in TABLE.values():
        if row.flanneld is not None:
            assert flanneld.DEFAULTS.get(row.name, row.default or "") == FLAGS[row.flanneld].default, row.name
    assert settings_by().text("prefix") == "/coreos.com/network"
    assert settings_by().items("endpoints") == ("http://127.0.0.1:4001", "http://127.0.0.1:2379")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_documents_show_the_table(page: Path) -> None:
    """Name, fate, default and versions of every flag, in the table's order, each with a word on it."""
    cells = re.findall(
        r"^\| `-([\w-]+)` \| (kept|accepted|refused) \| (?:`(.*?)`)? *\| (.*?) \| (.+) \|$",
        page.read_text(),
        re.MULTILINE,
    )
    assert [row[:4] for row in cells] == [
        (flag.name, flag.fate.value, flag.default, flag.versions) for flag in FLAGS.values()
    ]
    if page == PAGES[0]:
        why = [re.sub("^(ignored|refused): ", "", flag.help) for flag in FLAGS.values()]
        assert [row[4] for row in cells] == why


FLANNEL = """
    etcd-endpoints http://127.0.0.1:4001,http://127.0.0.1:2379 AC; etcd-prefix /coreos.com/network AC; etcd-keyfile AC;
    etcd-certfile AC; etcd-cafile AC; etcd-username AC; etcd-password AC; kube-subnet-mgr false AC; public-ip AC;
    subnet-file /run/flannel/subnet.env AC; subnet-lease-renew-margin 60 AC; ip-masq false AC; version false AC; iface AC;
    help false AC; listen A; remote A; remote-keyfile A; remote-certfile A; remote-cafile A; networks A;
    watch-networks false A; subnet-dir /run/flannel/networks A; iface-regex C; iface-can-reach C; public-ipv6 C;
    kube-api-url C; kubeconfig-file C; kube-annotation-prefix flannel.alpha.coreos.com C;
    net-config-path /etc/kube-flannel/net-conf.json C; set-node-network-unavailable true C; healthz-ip 0.0.0.0 C;
    healthz-port 0 C; iptables-resync 5 C; iptables-forward-rules true C; ip-masq-fully-random-disable false C;
    ip-blackhole-route false C; v 0 AC; vmodule AC; log_backtrace_at AC; logtostderr true A; alsologtostderr false A;
    stderrthreshold ERROR A; log_dir A
"""
"""Flag, default, versions (A: 0.7.1, C: 0.28.9) as the real programs' sources have them (flannel.md 1.1)."""


def test_every_flag_of_both_flannels_is_in_the_table_with_its_default() -> None:
    theirs = {}
    for words in (row.split() for row in FLANNEL.split(";")):
        versions = {"A": "0.7.1", "C": "0.28.9", "AC": "0.7.1, 0.28.9"}[words[-1]]
        theirs[words[0]] = (words[1] if len(words) == 3 else "", versions)
    assert {flag.name: (flag.default, flag.versions) for flag in FLAGS.values()} == theirs


# ---- flags ----------------------------------------------------------------------------------------------------------


def test_the_deployment_notes_flags() -> None:
    chosen = settings_by(
        "-etcd-endpoints=http://192.168.6.15:2379,http://192.168.6.2:2379", "-etcd-prefix=/jxdd/network",
        "--logtostderr=false", "--log_dir=/var/log/flannel/", "--iface=eth0",
    )  # fmt: skip
    assert chosen.items("endpoints") == ("http://192.168.6.15:2379", "http://192.168.6.2:2379")
    assert chosen.text("prefix") == "/jxdd/network"
    assert chosen.source("prefix") == "-etcd-prefix"
    assert chosen.items("iface") == ("eth0",)


def test_the_last_of_a_flag_wins_and_interfaces_collect() -> None:
    chosen = settings_by("-etcd-prefix=/a", "--etcd-prefix", "/b", "-iface=eth0", "-iface", "eth1")
    assert chosen.text("prefix") == "/b"
    assert chosen.items("iface") == ("eth0", "eth1")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--logtostdrr=false"], "flag provided but not defined: -logtostdrr; did you mean -logtostderr?"),
        (["--log-dir=/x"], "flag provided but not defined: -log-dir; did you mean -log_dir?"),
        (["--etcd_prefix=/x"], "flag provided but not defined: -etcd_prefix; did you mean -etcd-prefix?"),
        (["--zzzzzzzz"], "flag provided but not defined: -zzzzzzzz"),
        (["-ip-masq=maybe"], 'invalid boolean value "maybe" for flag -ip-masq: parse error'),
        (["-ip-masq=yes"], 'invalid boolean value "yes" for flag -ip-masq: parse error'),
        (["-iptables-resync", "5s"], 'invalid value "5s" for flag -iptables-resync: parse error'),
        (["-v="], 'invalid value "" for flag -v: parse error'),
        (["-stderrthreshold=LOUD"], 'invalid value "LOUD" for flag -stderrthreshold: it is INFO'),
        (["-iface"], "flag needs an argument: -iface"),
        (["---x"], "bad flag syntax: ---x"),
        (["-=x"], "bad flag syntax: -=x"),
        (["extra"], 'unexpected word "extra"'),
        (["-ip-masq", "true", "-iface=eth0"], "write -ip-masq=true"),
        (["--", "-iface=eth0"], 'unexpected word "-iface=eth0"'),
    ],
)
def test_a_command_line_that_means_nothing_is_named(words: list[str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(words)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-kube-subnet-mgr"], "Kubernetes"),
        (["-listen=:8888"], "-etcd-endpoints"),
        (["-remote=10.0.0.1:8888"], "-etcd-endpoints"),
        (["-networks=blue,red"], "-etcd-prefix and -subnet-file"),
        (["-watch-networks"], "-etcd-prefix and -subnet-file"),
    ],
)
def test_what_would_be_another_program_is_refused_with_what_to_use_instead(
    words: list[str], says: str
) -> None:
    with pytest.raises(UsageError, match="is refused: ") as caught:
        given_by(*words)
    assert says in str(caught.value)


def test_a_refused_flag_at_its_default_is_fine() -> None:
    line = given_by("-kube-subnet-mgr=false", "-listen=", "-healthz-port=0", "-v=0")
    assert line.warnings == []


def test_a_flag_that_means_nothing_here_makes_one_line() -> None:
    line = given_by("-v=3", "-kube-api-url=http://x", "-set-node-network-unavailable=false")
    assert [warning.split(" is ignored: ")[0] for warning in line.warnings] == [
        "-v", "-kube-api-url", "-set-node-network-unavailable",
    ]  # fmt: skip


def test_a_password_on_the_command_line_works_and_is_warned_of_without_being_shown() -> None:
    line = given_by("-etcd-username=root", "-etcd-password=geheim")
    assert flanneld.settings(line, environment={}).text("password") == "geheim"
    assert any("-etcd-password is seen by everyone" in warning for warning in line.warnings)
    assert "geheim" not in str(line.warnings)


SAMPLE = {"bool": "true", "int": "7", "string": "x", "list": "x"}


def sample(name: str) -> str:
    """A value that is not the default."""
    row = FLAGS[name]
    if name == "stderrthreshold":
        return "INFO"
    return "false" if row.default == "true" else SAMPLE[row.kind]


@pytest.mark.parametrize("name", sorted(set(FLAGS) - {"help", "version"}))
def test_every_flag_and_its_variable_does_what_the_table_says(name: str) -> None:
    """KEPT arrives in the settings (or the log's), ACCEPTED makes one line, REFUSED ends it; flag and variable alike."""
    row, text = FLAGS[name], sample(name)
    given = [f"-{name}={text}"], [f"--{name}={text}"], [f"-{name}", text]
    ways = [(words, {}) for words in given[: 2 if row.kind == "bool" else 3]]
    for words, env in [*ways, ([], {row.variable: text})]:
        if row.fate is Fate.REFUSED:
            with pytest.raises(UsageError, match=f"{'-' + name if words else row.variable} is refused: "):
                given_by(*words, env=env)
            continue
        line = given_by(*words, env=env)
        assert line.text(name) == text
        ignored = [warning for warning in line.warnings if " is ignored: " in warning]
        assert len(ignored) == (row.fate is Fate.ACCEPTED)
        ours = next((each.name for each in TABLE.values() if each.flanneld == name), None)
        if ours:
            assert flanneld.settings(line, environment=env).text(ours) == text


@pytest.mark.parametrize("name", sorted(FLAGS))
def test_an_empty_value_counts_as_not_given_or_is_refused_by_name(name: str) -> None:
    row = FLAGS[name]
    if row.kind in {"bool", "int"} or name in {"etcd-endpoints", "etcd-prefix", "stderrthreshold"}:
        with pytest.raises(UsageError, match=f"-{name}"):
            given_by(f"-{name}=")
    else:
        line = given_by(f"-{name}=")
        ours = next((each.name for each in TABLE.values() if each.flanneld == name), None)
        chosen = flanneld.settings(line, environment={})
        assert ours is None or chosen.optional(ours) is None
        if name in {"subnet-file", "healthz-ip"}:
            with pytest.raises(UsageError, match=f'^-{name} "" '):
                chosen.check(str(ours))
        elif ours is not None:
            chosen.check(ours)
    assert given_by(env={row.variable: ""}).given() == {}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-log_dir=/x"], ["-log_dir has no effect without -logtostderr=false"]),
        (["-logtostderr=false", "-log_dir=/x"], []),
        (["-alsologtostderr"], ["-alsologtostderr has no effect without -logtostderr=false"]),
        (["-healthz-ip=10.0.0.1"], ["-healthz-ip has no effect without -healthz-port"]),
        (["-healthz-ip=10.0.0.1", "-healthz-port=1"], []),
        (["-ip-masq", "-ip-masq=0"], ['-ip-masq is given twice; the last, "false", counts and not "true"']),
        (["-ip-masq", "-ip-masq=1", "-iface=a", "-iface=b"], []),
        (
            ["-etcd-prefix=/a", "-etcd-prefix=/b"],
            ['-etcd-prefix is given twice; the last, "/b", counts and not "/a"'],
        ),
    ],
)
def test_flags_that_contradict_each_other_are_named_once_and_the_rule_is_said(
    words: list[str], says: list[str]
) -> None:
    assert given_by(*words).warnings == says


def test_a_password_given_twice_is_not_shown() -> None:
    line = given_by("-etcd-password=geheim1", "-etcd-password=geheim2")
    assert any("-etcd-password is given twice" in warning for warning in line.warnings)
    assert "geheim" not in str(line.warnings)


# ---- variables ------------------------------------------------------------------------------------------------------


def test_a_variable_counts_where_no_flag_is_given_and_an_empty_one_is_unset() -> None:
    env = {
        "FLANNELD_ETCD_PREFIX": "/env",
        "FLANNELD_IP_MASQ": "T",
        "FLANNELD_IFACE": "",
        "FLANNELD_VERSION": "1",
    }
    chosen = settings_by("-etcd-prefix=/flag", env=env)
    assert chosen.text("prefix") == "/flag"
    assert chosen.switch("ip_masq")
    assert chosen.optional("iface") is None
    assert settings_by(env=env).source("prefix") == "FLANNELD_ETCD_PREFIX"


def test_a_bad_variable_is_said_and_the_default_used() -> None:
    line = given_by(env={"FLANNELD_IPTABLES_RESYNC": "abc"})
    assert line.text("iptables-resync") == "5"
    assert line.warnings == [
        'invalid value "abc" for flag FLANNELD_IPTABLES_RESYNC: parse error; the default 5 is used'
    ]


def test_a_variable_can_be_refused_too() -> None:
    with pytest.raises(UsageError, match="FLANNELD_KUBE_SUBNET_MGR is refused"):
        given_by(env={"FLANNELD_KUBE_SUBNET_MGR": "true"})


def test_it_does_not_read_what_flanneld_never_read() -> None:
    env = {
        "FLANNEL_ETCD_ENDPOINTS": "http://no:1",
        "ETCDCTL_ENDPOINTS": "http://no:2",
        "FLANNEL_ETCD_KEY": "/no",
    }
    chosen = settings_by(env=env)
    assert chosen.source("endpoints") == chosen.source("prefix") == "flanneld's default"


@given(
    flag=st.none() | st.just("/flag"),
    ours=st.none() | st.just("/ours"),
    theirs=st.none() | st.just("/theirs"),
    other=st.sampled_from(["FLANNEL_ETCD_PREFIX", "FLANNEL_ETCD_KEY", "ETCDCTL_PREFIX"]),
)
def test_the_strongest_source_wins(
    flag: str | None, ours: str | None, theirs: str | None, other: str
) -> None:
    env = {other: "/never"}
    env |= {"FLANCTL_PREFIX": ours} if ours else {}
    env |= {"FLANNELD_ETCD_PREFIX": theirs} if theirs else {}
    chosen = settings_by(*([f"-etcd-prefix={flag}"] if flag else []), env=env)
    assert chosen.text("prefix") == (flag or ours or theirs or "/coreos.com/network")


@given(st.data())
@hypothesis_settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None
)
def test_of_all_places_that_set_a_setting_flannelds_strongest_counts(
    tmp_path: Path, data: st.DataObject
) -> None:
    """flag, FLANCTL_*, FLANNELD_*, TOML, default; FLANNEL_* and ETCDCTL_* never."""
    row = data.draw(st.sampled_from(list(TABLE.values())))
    flag = None if row.flanneld is None else FLAGS[row.flanneld]
    places = [f"-{flag.name}"] if flag else []
    places += [name for name in row.variables() if name.startswith(("FLANCTL_", "FLANNELD_"))]
    places.append(row.name)
    used = data.draw(st.lists(st.sampled_from(range(len(places))), unique=True).map(sorted))
    env = dict.fromkeys(set(row.variables()) - set(places), "never")
    words, toml, told = [], "", []
    for number in used:
        name = places[number]
        text = f"v{number}"
        if flag and name in {f"-{flag.name}", flag.variable}:
            text = {"bool": "true" if number else "false", "int": str(number + 7)}.get(flag.kind, text)
        told.append((text, name))
        if name.startswith("-"):
            words.append(f"{name}={text}")
        elif name == row.name:
            toml = f"{name} = '{text}'\n"
        elif data.draw(st.booleans(), label=f"{name} is empty"):
            env[name] = ""
            told.pop()
        else:
            env[name] = text
    file = tmp_path / "flanctl.toml"
    file.write_text(toml)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flanctl.settings.TOML_FILE", str(file))
        found = settings_by(*words, env=env).values.get(row.name)
    if told:
        text, name = told[0]
        assert found is not None
        assert (found.text, found.source) == (text, f"{name} in {file}:1" if name == row.name else name)
    elif row.name in flanneld.DEFAULTS:
        assert found is not None
        assert (found.text, found.source) == (flanneld.DEFAULTS[row.name], "flanneld's default")
    elif row.default is None:
        assert found is None
    else:
        assert found is not None
        assert (found.text, found.source) == (row.default, "default")


@given(
    st.lists(
        st.text(max_size=12) | st.sampled_from([f"-{name}" for name in FLAGS] + ["-v=1", "true"]), max_size=5
    )
)
def test_no_command_line_is_more_than_a_usage_error(words: list[str]) -> None:
    try:
        line = given_by(*words)
    except UsageError as error:
        assert str(error)
    else:
        assert set(line.flags) <= set(FLAGS)


# ---- as a process ---------------------------------------------------------------------------------------------------


def test_help_and_version_go_to_stderr_and_end_with_0() -> None:
    for word in ("--help", "-help", "-h"):
        done = run("flanneld", word)
        assert (done.returncode, done.stdout) == (0, "")
        assert all(f"-{name}" in done.stderr for name in FLAGS)
    done = run("flanneld", "-version", FLANNELD_HELP="true")
    assert (done.returncode, done.stdout) == (0, "")
    assert re.fullmatch(r"flanctl \S+ as flanneld\n", done.stderr)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--nosuch"], 2),
        (["-ip-masq=maybe"], 2),
        (["-iface"], 2),
        (["extra"], 2),
        (["-ip-masq", "true", "-iface=eth0"], 2),
        (["--kube-subnet-mgr"], 2),
        (["--listen=:1", "--remote=x:1"], 2),
        (["-etcd-endpoints="], 2),
        (["-etcd-prefix="], 2),
        (["-subnet-lease-renew-margin=1440"], 2),
        (["-etcd-certfile=/nosuch"], 2),
        (["-iptables-resync=0"], 2),
        (["-subnet-file="], 2),
        (["-healthz-ip="], 2),
        (["-iface=nosuch0"], 1),
        (["-iface-regex=["], 1),
        (["-iface-can-reach=abc"], 1),
        (["-public-ip=abc"], 1),
        (["-etcd-endpoints=https://127.0.0.1:1", "-etcd-cafile=/nosuch"], 1),
    ],
)
@pytest.mark.needs("root")
def test_exit_codes(words: list[str], code: int, tmp_path: Path) -> None:
    done = run("flanneld", *words, FLANCTL_RUN_DIR=str(tmp_path), FLANCTL_STATE_DIR=str(tmp_path))
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr


@pytest.mark.parametrize(
    ("words", "env", "says"),
    [
        (["-etcd-certfile=/x"], {}, "-etcd-certfile needs -etcd-keyfile"),
        (["-etcd-keyfile=/x"], {}, "-etcd-keyfile needs -etcd-certfile"),
        (["-iptables-resync=0"], {}, '-iptables-resync "0" (from -iptables-resync) is not a whole number'),
        ([], {"FLANNELD_IPTABLES_RESYNC": "-3"}, "is not a whole number of seconds, 1 or more"),
        ([], {"FLANCTL_IPTABLES_RESYNC": "0"}, "is not a duration such as 5s"),
        ([], {"FLANCTL_STATE_DIR": "", "FLANCTL_PEER_CHECK": "x"}, 'FLANCTL_PEER_CHECK "x" (from'),
    ],
)
@pytest.mark.needs("root")
def test_an_error_names_what_flanneld_has(
    words: list[str], env: dict[str, str], says: str, tmp_path: Path
) -> None:
    dirs = {"FLANCTL_RUN_DIR": str(tmp_path), "FLANCTL_STATE_DIR": str(tmp_path)}
    done = run("flanneld", *words, **(dirs | env))
    assert done.returncode == 2
    assert says in done.stderr
    assert "--" not in done.stderr


# ---- flanneld-start -------------------------------------------------------------------------------------------------


def test_the_centos_script_makes_two_flags() -> None:
    env = {"FLANNEL_ETCD_ENDPOINTS": "http://a:1", "FLANNEL_ETCD_PREFIX": "/p", "FLANNEL_ETCD": "http://no:1"}
    assert flanneld_start.flags_from(env) == ["-etcd-endpoints=http://a:1", "-etcd-prefix=/p"]


def test_the_older_names_count_where_the_newer_are_empty() -> None:
    env = {"FLANNEL_ETCD_ENDPOINTS": "", "FLANNEL_ETCD": "http://a:1", "FLANNEL_ETCD_KEY": "/p"}
    assert flanneld_start.flags_from(env) == ["-etcd-endpoints=http://a:1", "-etcd-prefix=/p"]


@pytest.mark.parametrize(
    ("env", "missing"),
    [
        ({}, "FLANNEL_ETCD_ENDPOINTS"),
        ({"FLANNEL_ETCD_PREFIX": "/p"}, "FLANNEL_ETCD_ENDPOINTS"),
        ({"FLANNELD_ETCD_ENDPOINTS": "http://a:1", "FLANNEL_ETCD_PREFIX": "/p"}, "FLANNEL_ETCD_ENDPOINTS"),
        ({"FLANNEL_ETCD": "http://a:1"}, "FLANNEL_ETCD_PREFIX"),
    ],
)
def test_an_empty_result_names_variable_and_file(env: dict[str, str], missing: str) -> None:
    done = run("flanneld-start", "--iface=eth0", **env)
    assert done.returncode == 2
    assert (
        done.stderr == f"flanneld-start: {missing} is empty or not set; give it in /etc/sysconfig/flanneld\n"
    )


def test_flags_given_by_hand_need_no_variable() -> None:
    assert flanneld_start.flags_from({}, ["-etcd-endpoints=x", "--etcd-prefix", "/p"]) == []
    assert run("flanneld-start", "--version").returncode == 0
