"""flanctl.frozen.Libraries with real extension modules, compiled here, as parts of a real file."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from assemble import assemble

from flanctl.errors import FlanctlError
from flanctl.frozen import Libraries

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

SOURCE = """
#include <Python.h>
static PyObject *who(PyObject *self, PyObject *args) { return PyUnicode_FromString(WHO); }
static PyMethodDef methods[] = {{"who", who, METH_NOARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, NAME, NULL, -1, methods};
PyMODINIT_FUNC INIT(void) {
#ifdef FAILS
    PyErr_SetString(PyExc_OSError, "this one does not want to");
    return NULL;
#endif
    return PyModule_Create(&definition);
}
"""


def compiled(folder: Path, name: str, *options: str) -> Path:
    source = folder / "module.c"
    source.write_text(SOURCE)
    out = folder / f"{name}.so"
    short = name.rpartition(".")[2]
    subprocess.run(
        ["cc", "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", "-o", out, source]
        + [f'-DNAME="{name}"', f"-DINIT=PyInit_{short}", f'-DWHO="{name}"', *options],
        check=True,
    )
    return out


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("libraries")
    made = {name: compiled(folder, name) for name in ("fz_one", "fz_two", "fz_three")}
    made["fz_pack._inner"] = compiled(folder, "fz_pack._inner")
    made["fz_fails"] = compiled(folder, "fz_fails", "-DFAILS")
    missing = folder / "libfz_absent.so"
    subprocess.run(["cc", "-shared", "-o", missing, "-x", "c", "/dev/null"], check=True)
    made["fz_needs"] = compiled(folder, "fz_needs", "-Wl,--no-as-needed", str(missing))
    missing.unlink()
    made["fz_text"] = folder / "text"
    made["fz_text"].write_text("this is no library\n" * 1000)
    return made


@pytest.fixture
def executable(libraries, tmp_path):
    """A file as `make freeze` assembles it, and where its parts are."""
    out = tmp_path / "executable"
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF" + bytes(5000))
    assemble(program, libraries, out)
    content = out.read_bytes()
    # Found by looking for them, not by reading the table: the table is test_assemble.py's.
    return out, {
        name: (content.index(path.read_bytes()), path.stat().st_size) for name, path in libraries.items()
    }


@pytest.fixture
def finder(executable):
    """A finder on `executable` in sys.meta_path, and nothing of it left afterwards."""
    finders = []

    def make(**options):
        path, parts = executable
        finder = Libraries(
            options.pop("parts", parts), executable=str(options.pop("executable", path)), **options
        )
        finders.append(finder)
        sys.meta_path.insert(0, finder)
        return finder

    yield make
    for finder in finders:
        sys.meta_path.remove(finder)
    for name in [name for name in sys.modules if name.startswith("fz_")]:
        del sys.modules[name]


def loaded(name):
    """Import anew, whatever an earlier test has imported."""
    sys.modules.pop(name, None)
    module = importlib.import_module(name)
    assert module.who() == name
    return module


def number(finder, name):
    return int(finder.origins[name].rpartition("/")[2])


def refused(code=errno.ENOSYS):
    def memfd(name, flags):
        raise OSError(code, os.strerror(code))

    return memfd


def test_two_libraries_are_two(finder):
    it = finder()
    one, two = loaded("fz_one"), loaded("fz_two")
    assert one.__file__ != two.__file__
    assert number(it, "fz_one") != number(it, "fz_two")
    assert one.__spec__.origin == it.origins["fz_one"]


def test_a_module_of_a_package(finder, monkeypatch):
    finder()
    package = importlib.util.module_from_spec(
        importlib.util.spec_from_loader("fz_pack", None, is_package=True)
    )
    monkeypatch.setitem(sys.modules, "fz_pack", package)
    assert loaded("fz_pack._inner").__package__ == "fz_pack"


def test_what_it_does_not_hold_is_left_to_others(finder):
    it = finder()
    assert it.find_spec("json") is None
    assert it.find_spec("fz_none") is None
    assert it.find_spec("fz_pack") is None
    with pytest.raises(ModuleNotFoundError, match="fz_none"):
        loaded("fz_none")
    assert it.origins == {}


def test_nothing_is_copied_before_it_is_imported(finder):
    before = os.listdir("/proc/self/fd")
    it = finder()
    assert os.listdir("/proc/self/fd") == before
    assert it.origins == {}


def test_a_descriptor_is_never_closed_and_a_number_never_used_again(finder):
    """The dynamic loader goes by the path: a second library under the first one's number would be the first one."""
    it = finder()
    loaded("fz_one")
    kept = number(it, "fz_one")
    assert os.readlink(f"/proc/self/fd/{kept}").startswith("/memfd:fz_one")
    loaded("fz_two")
    loaded("fz_three")
    numbers = [number(it, name) for name in ("fz_one", "fz_two", "fz_three")]
    assert len(set(numbers)) == 3
    for descriptor in numbers:
        os.fstat(descriptor)
    again = loaded("fz_one")
    assert (number(it, "fz_one"), again.__file__) == (kept, f"/proc/self/fd/{kept}")


def test_descriptors_are_not_inherited(finder):
    it = finder()
    loaded("fz_one")
    assert not os.get_inheritable(number(it, "fz_one"))


def test_one_that_fails_in_its_init(finder):
    finder(damage=lambda: pytest.fail("its own error says it"))
    with pytest.raises(OSError, match="does not want to"):
        loaded("fz_fails")
    loaded("fz_one")


@pytest.mark.parametrize(
    ("name", "says"), [("fz_needs", "libfz_absent.so"), ("fz_text", "invalid ELF header|file too short")]
)
def test_one_that_will_not_load(finder, name, says):
    """A library of the host is missing, or it is none: ImportError, as from a file; others are not affected."""
    finder()
    for _ in range(2):
        with pytest.raises(ImportError, match=says):
            loaded(name)
    loaded("fz_two")


def test_one_that_will_not_load_because_the_file_is_damaged_says_that(finder):
    finder(damage=lambda: "its content was altered")
    with pytest.raises(FlanctlError, match="this file is damaged: its content was altered") as caught:
        loaded("fz_text")
    assert "flanctl.sha256" in caught.value.hint


def test_the_flag_for_executable_memory_and_without_it_on_older_kernels(finder):
    asked = []

    def memfd(name, flags):
        asked.append(flags)
        if flags & 0x10:
            raise OSError(errno.EINVAL, "Invalid argument")
        return os.memfd_create(name, flags)

    it = finder(memfd=memfd)
    loaded("fz_one")
    assert asked == [0x11, 0x01]
    assert os.readlink(it.origins["fz_one"]).startswith("/memfd:")


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM, errno.EMFILE])
def test_without_memfd_a_file_without_a_name(finder, tmp_path, code):
    it = finder(memfd=refused(code), folders=(str(tmp_path / "absent"), str(tmp_path)))
    before = set(os.listdir(tmp_path))
    loaded("fz_one")
    loaded("fz_two")
    assert set(os.listdir(tmp_path)) == before
    assert os.readlink(it.origins["fz_one"]).endswith(" (deleted)")
    status = os.stat(it.origins["fz_one"])
    assert (status.st_mode & 0o777, status.st_nlink) == (0o700, 0)


@pytest.mark.needs("root")
def test_folders_that_are_noexec_or_read_only_or_full_are_passed_over(executable, tmp_path):
    """In a process of its own, for the mounts."""
    path, parts = executable
    places = {}
    script = "set -e\n"
    for name, options in (("noexec", "-o noexec"), ("ro", "-o ro"), ("full", "-o size=4k"), ("good", "")):
        places[name] = tmp_path / name
        places[name].mkdir()
        script += f"mount -t tmpfs {options} tmpfs {places[name]}\n"
    code = f"""
import sys
sys.path[:0] = [{str(Path.cwd())!r}]
from flanctl.frozen import Libraries
def memfd(name, flags):
    raise OSError(38, "Function not implemented")
parts = {parts!r}
it = Libraries(parts, executable={str(path)!r}, memfd=memfd, folders={[str(place) for place in places.values()]!r})
sys.meta_path.insert(0, it)
import fz_one, os
print(fz_one.who(), os.readlink(it.origins["fz_one"]))
bad = Libraries(parts, executable={str(path)!r}, memfd=memfd, folders={[str(places[name]) for name in ("noexec", "ro", "full")]!r})
before = os.listdir("/proc/self/fd")
try:
    bad.find_spec("fz_two")
except ImportError as error:
    print(error, error.name)
assert os.listdir("/proc/self/fd") == before, "a descriptor stayed open"
"""
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            script + 'exec "$@"',
            "sh",
            sys.executable,
            "-c",
            code,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(f"fz_one {places['good']}/.flanctl-")
    assert "no place to load fz_two from (memory: Function not implemented" in second
    assert f"{places['noexec']}: Operation not permitted" in second
    assert f"{places['ro']}: Read-only file system" in second
    assert f"{places['full']}: No space left on device" in second
    assert second.endswith(" fz_two")


def test_an_executable_that_became_shorter(finder, executable):
    path, parts = executable
    offset, length = parts["fz_two"]
    with path.open("r+b") as file:
        file.truncate(offset + length // 2)
    it = finder(folders=())
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ImportError, match=f"no place to load fz_two from .*{path} ends too early"):
        it.find_spec("fz_two")
    assert os.listdir("/proc/self/fd") == before
    assert it.origins == {}


def test_an_executable_that_cannot_be_opened(finder):
    it = finder(executable="/nonexistent", folders=())
    with pytest.raises(ImportError, match="No such file"):
        it.find_spec("fz_one")


def test_a_failure_is_not_remembered(finder, tmp_path):
    """Descriptors may be short for a while only."""
    short = [True]

    def memfd(name, flags):
        if short[0]:
            raise OSError(errno.EMFILE, "Too many open files")
        return os.memfd_create(name, flags)

    it = finder(memfd=memfd, folders=())
    with pytest.raises(ImportError, match="Too many open files"):
        loaded("fz_one")
    short[0] = False
    loaded("fz_one")
    assert it.origins.keys() == {"fz_one"}
