"""`flanctl config`: who said so. `flanctl config check`: what is wrong there, by file and line."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanctl.commands.config_check import check_environment, check_file, check_together
from flanctl.errors import UsageError
from flanctl.settings import TABLE, resolve
from tests.support.cli import flanctl
from tests.unit.test_settings import NOTE

GOOD = 'FLANNEL_ETCD_ENDPOINTS="http://a:2379"\nFLANNEL_ETCD_PREFIX="/p"\n'


@pytest.fixture
def check(tmp_path):
    def run(content, name="flanneld", mode=0o644):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        file.chmod(mode)
        return check_file(str(file))

    return run


def short(findings):
    return [(finding.severity, finding.id, finding.line) for finding in findings]


# ---- config ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def host(tmp_path):
    """flanctl on a host whose /etc holds these files: in a mount namespace, over the real one."""

    def run(*words, files=None, **options):
        for name in ("upper", "work"):
            (tmp_path / name).mkdir(exist_ok=True)
        for path, text in (files or {}).items():
            file = tmp_path / "upper" / path
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        lay = f"lowerdir=/etc,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
        script = 'mount -t overlay -o "$0" overlay /etc && exec "$@"'
        prefix = ("unshare", "--mount", "--propagation", "private", "sh", "-c", script, lay)
        return flanctl(*words, prefix=prefix, **options)

    return run


@pytest.mark.needs("netns")
def test_on_a_host_that_runs_flannel_no_flag_is_needed(host, tmp_path):
    registry = f"sqlite:{tmp_path / 'registry.db'}"
    made = flanctl(
        "net", "init", "--network", "172.31.0.0/16", "--endpoints", registry, "--prefix", "/jxdd/other"
    )
    assert made.code == 0
    sysconfig = NOTE.replace(
        "http://192.168.6.15:2379,http://192.168.6.2:2379,http://192.168.6.5:2379", registry
    )
    answer = host("subnets", "ls", "-w", "json", files={"sysconfig/flanneld": sysconfig})
    assert (answer.code, answer.err) == (0, "")
    assert json.loads(answer.out)["network"] == "172.31.0.0/16"
    shown = host("config", files={"sysconfig/flanneld": sysconfig}).out
    assert f"{registry}" in shown
    rows = {line.split()[0]: line for line in shown.splitlines()}
    assert rows["prefix"].split() == [
        "prefix",
        "/jxdd/other",
        "FLANNEL_ETCD_PREFIX",
        "in",
        "/etc/sysconfig/flanneld:8",
    ]
    assert rows["iface"].endswith("FLANNEL_OPTIONS in /etc/sysconfig/flanneld:11")


@pytest.mark.needs("netns")
def test_a_broken_sysconfig_is_one_line_that_says_what_to_run_and_that_finds_it(host):
    files = {"sysconfig/flanneld": 'FLANNEL_ETCD_PREFIX="/jxdd\nB=1\n'}
    answer = host("subnets", "ls", files=files)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == (
        "flanctl subnets ls: /etc/sysconfig/flanneld:1: the quote of FLANNEL_ETCD_PREFIX is never closed\n"
        "try: flanctl config check /etc/sysconfig/flanneld\n"
    )
    found = host("config", "check", "-w", "simple", files=files)
    assert found.code == 1
    assert found.out.startswith("fail\tunclosed-quote\t/etc/sysconfig/flanneld\t1\t")


def test_every_setting_is_shown_with_its_source_in_all_three_forms():
    env = {"FLANNELD_ETCD_PREFIX": "/env", "FLANCTL_IFACE_REGEX": "^a{1,2}\n^b"}
    rows = [
        line.split("\t")
        for line in flanctl("config", "-w", "simple", "--api", "v3", env=env).out.splitlines()
    ]
    assert [row[0] for row in rows] == list(TABLE)
    found = {row[0]: row[1:] for row in rows}
    assert found["prefix"] == ["/env", "FLANNELD_ETCD_PREFIX"]
    assert found["api"] == ["v3", "--api"]
    assert found["timeout"] == ["5", "default"]
    assert found["cert"] == ["-", "-"]
    document = json.loads(flanctl("config", "-w", "json", env=env).out)
    by_name = {each["name"]: each for each in document["settings"]}
    assert list(by_name) == list(TABLE)
    assert by_name["iface_regex"]["value"] == ["^a{1,2}", "^b"]
    assert by_name["cert"]["value"] is by_name["cert"]["source"] is None
    assert flanctl("config", env=env).out.splitlines()[0].split() == ["SETTING", "VALUE", "SOURCE"]


@pytest.mark.parametrize("form", ["table", "simple", "json"])
def test_no_secret_is_ever_shown(form, tmp_path):
    env = {
        "FLANCTL_PASSWORD": "geheim1",
        "FLANCTL_USER": "root:geheim2",
        "FLANCTL_ENDPOINTS": "http://root:geheim3@a:2379,x:geheim4@b",
    }
    answer = flanctl("config", "-w", form, env=env)
    assert answer.code == 0
    assert answer.out.count("(hidden)") == 4
    assert "geheim" not in answer.out + answer.err
    file = tmp_path / "flanneld"
    file.write_text(
        'FLANNELD_ETCD_PASSWORD="geheim1" x\nETCDCTL_USER="root:geheim2"x\n'
        'FLANNEL_OPTIONS="-etcd-password=geheim3 -etcd-password=\'geheim4"\nFLANNEL_ETCD=http://u:geheim5@a\n'
    )
    answer = flanctl("config", "check", file, "-w", form)
    assert answer.code == 1
    assert "secret-readable" in answer.out
    assert "geheim" not in answer.out + answer.err


@pytest.mark.parametrize(
    "options",
    [
        "-etcd-password = geheim",
        "-etcd-password=geheim -etcd-password=geheim2",
        "-etcd-username=u:geheim -etcd-username=u:geheim2",
        "-etcd-endpoints=http://u:geheim@a -etcd-endpoints=http://u:geheim@b",
        "-etcd-endpoints=htp://u:geheim@a",
        "-etcd-endpoints=http://u:geheim@a:x/y “",
        "-etcd-password=geheim 'x",
    ],
)
def test_no_mistake_beside_a_secret_shows_it(options, tmp_path):
    file = tmp_path / "flanneld"
    file.write_text(f'{GOOD}FLANNEL_OPTIONS="{options}"\n')
    answer = flanctl("config", "check", file)
    assert answer.code == 1
    assert "geheim" not in answer.out + answer.err


@pytest.mark.parametrize(
    "line",
    [
        "FLANNELD_ETCD_PASSWORD: geheim",
        "FLANNELD_ETCD_PASSWORD geheim",
        'FLANNEL_OPTIONS="foo --etcd-password=geheim" #x',
        'FLANNEL_OPTIONS="foo -etcd-endpoints=http://u:ge@heim@h" #x',
    ],
)
def test_no_line_that_cannot_be_read_shows_the_secret_in_it(line, tmp_path):
    file = tmp_path / "flanneld"
    file.write_text(f"{GOOD}{line}\n")
    answer = flanctl("config", "check", file)
    assert "ok" not in answer.out.split()[:1], answer.out
    assert "geheim" not in answer.out + answer.err
    assert "heim@" not in answer.out + answer.err


# ---- config check: sysconfig ----------------------------------------------------------------------------------------


def test_the_deployment_notes_file_is_fine(check):
    assert check(NOTE) == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (GOOD + "FLANNEL_ETCD_ENDPONTS=http://a:1\n", ("fail", "unknown-name", 3)),
        (GOOD + "FLANNELD_NO_SUCH=1\n", ("fail", "unknown-name", 3)),
        (GOOD + "FLANCTL_PREFX=/x\n", ("fail", "unknown-name", 3)),
        (GOOD + "FLANEL_OPTIONS=-ip-masq\n", ("warn", "unknown-name", 3)),
        (GOOD + "FLANNEL_OPTIONS=--logtostdrr=false\n", ("fail", "unknown-flag", 3)),
        (GOOD + "FLANNEL_OPTIONS='-ip-masq=maybe'\n", ("fail", "bad-value", 3)),
        (GOOD + "FLANNEL_OPTIONS='-healthz-port=65536'\n", ("fail", "bad-value", 3)),
        (GOOD + "FLANNEL_OPTIONS=-iface\n", ("fail", "bad-value", 3)),
        (GOOD + "FLANNEL_OPTIONS='---iface=a'\n", ("fail", "bad-flag", 3)),
        (GOOD + "FLANNEL_OPTIONS='-ip-masq true'\n", ("fail", "stray-word", 3)),
        (GOOD + "FLANNELD_IPTABLES_RESYNC=5s\n", ("fail", "bad-value", 3)),
        (GOOD + "FLANNEL_OPTIONS='-v=3'\n", ("warn", "dead-flag", 3)),
        (GOOD + "FLANNELD_KUBE_API_URL=http://x\n", ("warn", "dead-flag", 3)),
        (GOOD + "FLANNEL_OPTIONS=-kube-subnet-mgr\n", ("fail", "refused-flag", 3)),
        (GOOD + "FLANNELD_NETWORKS=a,b\n", ("fail", "refused-flag", 3)),
        (GOOD + "FLANNEL_OPTIONS='-etcd-endpoints='\n", ("fail", "empty-value", 3)),
        (GOOD + "FLANNEL_OPTIONS='-public-ip='\n", ("warn", "empty-value", 3)),
        (GOOD + "FLANNEL_OPTIONS='-subnet-file='\n", ("fail", "bad-value", 3)),
        (GOOD + "FLANNEL_OPTIONS='-healthz-ip= -healthz-port=1'\n", ("fail", "bad-value", 3)),
        (GOOD + "FLANNEL_OPTIONS='-iface-regex=['\n", ("fail", "bad-value", 3)),
        (GOOD + "FLANNEL_OPTIONS='-iface-can-reach=abc'\n", ("fail", "bad-value", 3)),
        ("FLANNEL_ETCD_ENDPOINTS=\nFLANNEL_ETCD_PREFIX=/p\n", ("fail", "empty-value", 1)),
        ("FLANNELD_ETCD_ENDPOINTS=http://a:1\nFLANNEL_ETCD_PREFIX=/p\n", ("warn", "other-name", 1)),
        (GOOD + "FLANNEL_OPTIONS='-iface=a -ip-masq -ip-masq=false'\n", ("warn", "contradiction", 3)),
        (GOOD + "FLANNEL_OPTIONS='-log_dir=/var/log'\n", ("warn", "contradiction", 3)),
        (GOOD + "FLANNEL_OPTIONS='-healthz-ip=10.0.0.1'\n", ("warn", "contradiction", 3)),
        (GOOD + "FLANNEL_OPTIONS='-etcd-prefix=/other'\n", ("warn", "contradiction", 2)),
        (GOOD + "FLANNEL_ETCD=http://b:2379\n", ("warn", "contradiction", 3)),
        ("FLANNEL_ETCD_PREFIX=/x\n" + GOOD, ("warn", "contradiction", 1)),
        (GOOD + 'FLANNEL_OPTIONS="--iface=eth0\n', ("fail", "unclosed-quote", 3)),
        (GOOD + "FLANNEL_OPTIONS=\"--log_dir='/a b --logtostderr=false\"\n", ("fail", "unclosed-quote", 3)),
        (GOOD + 'FLANNEL_OPTIONS="--iface=eth0" --ip-masq\n', ("fail", "quoting", 3)),
        (GOOD + "FLANNEL_OPTIONS=“--iface=eth0”\n", ("fail", "quoting", 3)),
        (GOOD + 'FLANCTL_IFACE=eth"0"\n', ("fail", "quoting", 3)),
        (GOOD + "FLANCTL_IFACE=eth0 # the fast one\n", ("fail", "quoting", 3)),
        (GOOD + "FLANCTL_IFACE=$IFACE\n", ("fail", "no-expansion", 3)),
        (GOOD + 'FLANNEL_OPTIONS="--public-ip=$(hostname)"\n', ("fail", "no-expansion", 3)),
        (GOOD + "export FLANCTL_IFACE=eth0\n", ("fail", "bad-name", 3)),
        (GOOD + "eth0 is the fast one\n", ("warn", "no-assignment", 3)),
        (GOOD + 'FLANNEL_OPTIONS="--iface=eth0 \\ \n --ip-masq"\n', ("fail", "broken-continuation", 3)),
        ("# etcd \\\n" + GOOD, ("warn", "comment-continues", 2)),
        (GOOD.replace("\n", "\r\n"), ("warn", "crlf", 1)),
        (GOOD.replace("\n", "\r\n") + 'FLANNEL_OPTIONS="-iface=a\r\n-ip-masq"\r\n', ("fail", "crlf", 3)),
        ("\ufeff" + GOOD, ("fail", "byte-order-mark", 1)),
        ("\ufeff# c\n" + GOOD, ("warn", "byte-order-mark", 1)),
        (GOOD.encode("utf-16"), ("fail", "utf16", 0)),
        (GOOD.encode("utf-16-be"), ("fail", "utf16", 0)),
        (GOOD.encode() + b"A=\0\n", ("fail", "nul", 3)),
        (GOOD.encode() + b"A=\xff\n", ("fail", "not-utf8", 3)),
        (GOOD + "FLANNELD_ETCD_PASSWORD=x\n", ("fail", "secret-readable", 3)),
        (GOOD + "FLANNELD_ETCD_USERNAME=x\nFLANNEL_OPTIONS=-etcd-password=x\n", ("fail", "password-seen", 4)),
        (GOOD.replace("/p", "/a/../b"), ("fail", "bad-value", 2)),
        (GOOD.replace("a:2379", "a:port"), ("fail", "bad-value", 1)),
        (GOOD + "FLANNELD_PUBLIC_IP=node1\n", ("fail", "bad-value", 3)),
        (GOOD + "FLANCTL_PEER_CHECK=strong\n", ("fail", "bad-value", 3)),
    ],
)  # fmt: skip
def test_a_mistake_is_found_at_its_line(check, content, expected):
    found = check(content)
    assert expected in short(found), found
    if expected[1] not in {"secret-readable", "password-seen", "byte-order-mark"}:
        assert len(found) == 1, found  # one mistake is one finding
    assert all(finding.says and finding.next for finding in found)


def test_a_file_that_cannot_be_settings_by_its_size_is_not_read(check, tmp_path):
    assert short(check(b"#" * (1 << 20) + b"\n")) == [("fail", "too-large", 0)]
    answer = flanctl("config", "check", tmp_path / "flanneld")
    assert (answer.code, "larger than a megabyte" in answer.out) == (1, True)
    with pytest.raises(UsageError, match="larger than a megabyte"):
        resolve({}, environment={}, toml_file=os.devnull, sysconfig_files=[tmp_path / "flanneld"])


def test_a_secret_in_a_file_that_only_root_may_read_is_fine(check):
    assert check(GOOD + "FLANNELD_ETCD_USERNAME=x\nFLANNELD_ETCD_PASSWORD=x\n", mode=0o600) == []


def test_the_bytes_that_hide_a_variable_are_named(check):
    assert "FLANNEL_ETCD_ENDPOINTS" in check("\ufeff" + GOOD)[0].says


@given(st.binary(max_size=80) | st.text(max_size=80).map(lambda text: text.encode("utf-8", "replace")))
def test_no_file_is_more_than_findings(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("check")
    for name in ("flanneld", "flanctl.toml"):
        (folder / name).write_bytes(content)
        for finding in check_file(str(folder / name)):
            assert 0 <= finding.line <= content.count(b"\n") + 1, finding


@given(
    st.lists(
        st.sampled_from(["FLANNEL_OPTIONS=", "FLANNEL_ETCD_PREFIX=", "FLANNELD_IFACE=", '"', "'", "\\", "\n", " ", "-ip-masq"])
        | st.sampled_from(["-v", "=", "/p", "-etcd-endpoints=", "http://a", "true", "--", "$A", "#", "\r\n", "-healthz-ip=1"]),
        max_size=25,
    ).map("".join)
)  # fmt: skip
def test_what_the_check_calls_fine_is_read_without_error(tmp_path_factory, content):
    """The other way round need not hold: a comment behind a value is read, and is a mistake all the same."""
    file = tmp_path_factory.mktemp("check") / "flanneld"
    file.write_bytes(content.encode())
    if not any(finding.severity == "fail" for finding in check_file(str(file))):
        found = resolve({}, environment={}, toml_file=os.devnull, sysconfig_files=[file])
        for name in found.values:
            found.check(name)


# ---- config check: TOML, environment, all together ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('prefix = "/a"\nendpiont = "x"\n', ("fail", "unknown-name", 2)),
        ('prefix = "/a"\n[registry]\nprefix = "x"\n', ("fail", "unknown-name", 2)),
        ('prefix = "/a"\nendpoints = [\n', ("fail", "bad-toml", 3)),
        ("prefix = /a\n", ("fail", "bad-toml", 1)),
        ('prefix = "/a"\nprefix = "/b"\n', ("fail", "bad-toml", 2)),
        (b'prefix = "\xff"\n', ("fail", "bad-toml", 1)),
        ('\ufeffprefix = "/a"\n', ("fail", "byte-order-mark", 1)),
        ("\ntimeout = 0\n", ("fail", "bad-value", 2)),
        ("\n[timeout]\na = 1\n", ("fail", "bad-value", 2)),
        ('\n\npeer-check = "strong"\n', ("fail", "bad-value", 3)),
        ('user = "root"\npassword = "x"\n', ("fail", "secret-readable", 2)),
    ],
)
def test_a_mistake_in_the_toml_file_is_found_at_its_line(check, content, expected):
    assert short(check(content, name="flanctl.toml")) == [expected]


def test_all_unknown_names_are_named_at_once(check):
    found = check("iface = 'a'\nifac = 1\ntimeoutt = 2\n", name="flanctl.toml")
    assert [finding.says for finding in found] == [
        'unknown setting "ifac"; did you mean iface?',
        'unknown setting "timeoutt"; did you mean timeout?',
    ]


def test_the_environment_is_checked_too():
    found = check_environment(
        {"FLANCTL_PREFX": "1", "FLANNELD_V": "3", "FLANCTL_TIMEOUT": "no", "HOME": "/", "FLANNEL_MTU": "1472"}
    )
    assert sorted(short(found)) == [
        ("fail", "bad-value", 0),
        ("fail", "unknown-name", 0),
        ("warn", "dead-flag", 0),
    ]
    assert {finding.where for finding in found} == {"environment"}
    assert (
        check_environment({"FLANCTL_SHOW_MODULES": "1", "FLANCTL_WRITE_OUT": "json", "FLANCTL_IFACE": "a"})
        == []
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"cert": "/c", "endpoints": "https://a:1"}, ("fail", "contradiction")),
        ({"key": "/k"}, ("fail", "contradiction")),
        ({"password_file": "/p"}, ("warn", "contradiction")),
        ({"cacert": "/c", "endpoints": "http://a:1"}, ("warn", "contradiction")),
        ({"cacert": "/c", "endpoints": "http://a:1,https://b:1"}, None),
        ({"user": "root"}, None),
    ],
)
def test_settings_that_mean_nothing_together_are_named(flags, expected):
    found = check_together(resolve(flags, environment={}, toml_file=os.devnull, sysconfig_files=()))
    assert [(finding.severity, finding.id) for finding in found] == ([expected] if expected else [])


def test_a_key_that_everyone_may_read_is_named_with_its_path(tmp_path):
    key = tmp_path / "key.pem"
    key.write_text("x")
    key.chmod(0o644)
    flags = {"key": str(key), "cert": str(key), "endpoints": "https://a:1"}
    found = check_together(resolve(flags, environment={}, toml_file=os.devnull, sysconfig_files=()))
    assert [(finding.id, finding.where, finding.next) for finding in found] == [
        ("secret-readable", str(key), f"chmod 600 {key}")
    ]


def test_exit_codes(tmp_path):
    good, dead, bad = tmp_path / "good", tmp_path / "dead", tmp_path / "bad"
    good.write_text(GOOD)
    dead.write_text(GOOD + "FLANNEL_OPTIONS=-v=3\n")
    bad.write_text(GOOD + "FLANNEL_OPTIONS=--nosuch\n")
    fine = flanctl("config", "check", good)
    assert (fine.code, fine.out, fine.err) == (0, f"ok    {good}\n", "0 failed, 0 warnings\n")
    assert flanctl("config", "check", dead).code == 0
    assert flanctl("config", "check", "--strict", dead).code == 1
    failed = flanctl("config", "check", bad, good)
    assert failed.code == 1
    assert failed.out.splitlines() == [
        f"fail  {bad}:3: FLANNEL_OPTIONS: flag provided but not defined: -nosuch   [unknown-flag]",
        "      next: correct or delete it; flanneld --help lists all flags",
        f"ok    {good}",
    ]
    document = json.loads(flanctl("config", "check", bad, "-w", "json").out)
    assert document["checked"] == [str(bad)]
    assert [(each["id"], each["line"]) for each in document["findings"]] == [("unknown-flag", 3)]
    assert flanctl("config", "check", tmp_path / "none").code == 4
    assert flanctl("config", "check", "/dev/null").code == 7
    assert flanctl("config", "check").code == 0
    assert flanctl("config", "check", env={"FLANNELD_NOSUCH": "1"}).code == 1
