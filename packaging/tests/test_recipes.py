"""The lock of sources, the checks of a finished file, the list of parts, and flanctl/frozen.py's stand-ins."""

from __future__ import annotations

import difflib
import inspect
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import checks
import pytest
import sbom
from hypothesis import given
from hypothesis import strategies as st
from layers import Cache, Failure
from sources import PACKAGES, read_lock

from flanctl import frozen

LOCK = Path("packaging/sources.lock")
DIGEST = "a" * 64


@pytest.fixture
def cache(tmp_path):
    made = Cache(tmp_path / "cache")
    made.logs.mkdir(parents=True)
    return made


# ---- sources.lock ---------------------------------------------------------------------------------------------------


def test_the_lock_names_every_source_with_its_files():
    locked = read_lock(LOCK)
    assert set(locked) == set(PACKAGES)
    for source in locked.values():
        assert any(name.endswith(".dsc") for name, _ in source.files)
        assert source.pin == f"{source.name}={source.version}"


@pytest.mark.parametrize(
    "line", ["zlib", "zlib 1 2", "  nothex file", f"  {DIGEST[:-1]} file", f"  {DIGEST}", "<<<<<<< HEAD x"]
)
def test_a_line_that_is_not_understood_is_named(tmp_path, line):
    path = tmp_path / "sources.lock"
    path.write_text(f"# comment\n\nzlib 1\n  {DIGEST} zlib.dsc\n{line}\n")
    with pytest.raises(Failure, match=r"sources\.lock:5 is not understood: ") as caught:
        read_lock(path)
    assert "make lock-sources" in caught.value.hint


def test_what_the_lock_lacks_is_named(tmp_path):
    path = tmp_path / "sources.lock"
    path.write_text(f"zlib 1\n  {DIGEST} zlib.dsc\nopenssl 3\n")
    with pytest.raises(Failure, match=r"lacks bzip2, xz-utils, libffi, sqlite3, openssl, python3\.11"):
        read_lock(path)


# ---- checks ---------------------------------------------------------------------------------------------------------


def test_traces_of_the_builder_are_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SOME_TOKEN", "very-secret")
    monkeypatch.setenv("HARMLESS", "very-common")
    monkeypatch.setattr("socket.gethostname", lambda: "builder-7.example")
    monkeypatch.setattr("getpass.getuser", lambda: "somebody")
    for content, what in (
        (b"\0/home/somebody/.cargo\0", "the home folder"),
        (b"x" + str(Path.cwd()).encode() + b"x", "the working folder"),
        (b"builder-7.example", "the host name"),
        (b"very-secret", "the environment's SOME_TOKEN"),
        (b"by somebody", "the user name"),
    ):
        assert what in checks.builder_traces(content)
    assert checks.builder_traces(b"very-common, /home/some, root") == []


def compiled(folder, source, *options):
    (folder / "x.c").write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "x.so", folder / "x.c", *options], check=True)
    return folder / "x.so"


def test_a_newer_glibc_is_refused_with_the_symbol(tmp_path, cache):
    """gettid came with glibc 2.30."""
    path = compiled(
        tmp_path, "#include <sys/types.h>\npid_t gettid(void); pid_t f(void) { return gettid(); }"
    )
    with pytest.raises(Failure, match=r"x\.so asks for glibc 2\.30, newer than 2\.17") as caught:
        checks._glibc(cache, path)
    assert "gettid" in caught.value.details[0]


def test_an_old_glibc_is_fine_and_a_symbol_of_nobody_is_not(tmp_path, cache):
    old = compiled(tmp_path, "#include <unistd.h>\nint f(void) { return getpid(); }")
    assert tuple(map(int, checks._glibc(cache, old).split("."))) <= (2, 17)
    strong = compiled(tmp_path, "int nobody_has_this(void); int f(void) { return nobody_has_this(); }")
    with pytest.raises(Failure, match="needs symbols that no glibc") as caught:
        checks._glibc(cache, strong)
    assert "nobody_has_this" in caught.value.details[0]


def test_a_file_that_grew_too_large_is_refused(tmp_path, cache):
    path = compiled(tmp_path, "int f(void) { return 1; }")
    with pytest.raises(Failure, match=r"more than 10$"):
        checks.check(cache, path, path, [], most_bytes=10)


# ---- the list of parts ----------------------------------------------------------------------------------------------


def test_python_parts_have_version_licence_and_purl(tmp_path):
    for folder, text in {
        "a-1.dist-info": "Name: Some_Thing\nVersion: 1.5\nLicense-Expression: MIT\n",
        "b-2.dist-info": "Name: b\nVersion: 2\nClassifier: License :: OSI Approved :: BSD License\n",
        "c-3.dist-info": "Name: c\nVersion: 3\n",
    }.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "METADATA").write_text(f"Metadata-Version: 2.1\n{text}\nwords\n")
    shown = [
        (part["name"], part["version"], part["purl"], json.dumps(part["licenses"]))
        for part in sbom.python_parts(tmp_path)
    ]
    assert [part[:3] for part in shown] == [
        ("Some_Thing", "1.5", "pkg:pypi/some-thing@1.5"),
        ("b", "2", "pkg:pypi/b@2"),
        ("c", "3", "pkg:pypi/c@3"),
    ]
    for part, licence in zip(shown, ("MIT", "BSD-3-Clause", "LicenseRef-unknown"), strict=True):
        assert licence in part[3]


@pytest.mark.parametrize(
    ("written", "expression"),
    [
        ("MIT/Apache-2.0", "MIT OR Apache-2.0"),
        ("Apache License 2.0", "Apache-2.0"),
        ("(MIT OR Apache-2.0) AND Unicode-3.0", "(MIT OR Apache-2.0) AND Unicode-3.0"),
        ("Do what you like, please!", "LicenseRef-Do-what-you-like-please-"),
    ],
)
def test_licences_as_authors_write_them(written, expression):
    assert sbom._expression(written) == expression


# ---- flanctl/frozen.py ----------------------------------------------------------------------------------------------


@given(st.text(alphabet=st.sampled_from(" \tab\n\x0b\x0c\r\x1f\x85  ")))
def test_cleandoc_is_inspects(doc):
    assert frozen.cleandoc(doc) == inspect.cleandoc(doc)


@given(st.text())
def test_cleandoc_is_inspects_for_any_text(doc):
    assert frozen.cleandoc(doc) == inspect.cleandoc(doc)


@given(st.text(alphabet="-abcdr", max_size=4), st.lists(st.text(alphabet="-abcdr", max_size=6), max_size=5))
def test_close_matches_are_difflibs_but_for_short_options(word, possibilities):
    short = len(word) == 2 and word[0] == "-"
    expected = [] if short else difflib.get_close_matches(word, possibilities)
    assert frozen._close_matches(word, possibilities) == expected


@pytest.fixture
def later(tmp_path, monkeypatch):
    """A module fz_later on sys.path with a stand-in before it."""
    (tmp_path / "fz_later.py").write_text("known = 'the real one'\nother = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    frozen._import_later("fz_later", known={"known": "the stand-in's"})
    yield
    sys.modules.pop("fz_later", None)


def test_a_stand_in_knows_what_it_knows(later):
    import fz_later
    from fz_later import known

    assert known == fz_later.known == "the stand-in's"
    assert not isinstance(sys.modules["fz_later"], types.ModuleType)


def test_a_stand_in_becomes_the_module_when_more_is_asked(later):
    import fz_later
    from fz_later import other

    assert other == 7
    assert isinstance(sys.modules["fz_later"], types.ModuleType)
    assert sys.modules["fz_later"].known == "the real one"
    assert fz_later.other == 7, "who holds the stand-in goes on with it"
    with pytest.raises(AttributeError, match="nothing"):
        fz_later.nothing  # noqa: B018


def test_what_the_start_stands_in_for_exists(monkeypatch):
    """Names that click, uuid and tabulate use of those modules, checked against these modules themselves."""
    text = Path(frozen.__file__).read_text()
    names = dict(re.findall(r'_import_later\(\s*"([\w.]+)", known=\{"(\w+)":', text))
    assert set(names) == {"inspect", "difflib", "platform", "importlib.metadata"}
    for module, name in names.items():
        assert hasattr(__import__(module, fromlist=[name]), name)
