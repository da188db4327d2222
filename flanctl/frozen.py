"""What only the frozen executable does at its start and end; `flanctl/entry.py` calls it, nothing else knows of it.

- `start`: the interpreter as a short command wants it, and cygrpc importable out of the executable's own file.
- `leave`: the end without taking the interpreter apart, which costs as much as a third of a short command.

Imported at every start: keep it light (no typing, no importlib).
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import NoReturn

MODULES = "packed-resources"
"""The one part of the file that is no library: all Python modules."""
FOLDERS = ("/run", "/dev/shm", "/tmp", "/var/tmp")  # noqa: S108  the file is unlinked at once
"""Where a library is written to on a kernel without memfd_create (before 3.17), the first that allows execution."""
CLOEXEC = 1
EXEC = 0x10
"""Linux 6.3: without it vm.memfd_noexec=1 makes the file one that cannot be loaded. Older kernels refuse the flag."""
SHOW_MODULES = "FLANCTL_SHOW_MODULES"
"""Set: which modules a command has loaded is printed on stderr at its end, for the test that keeps it few."""


def start() -> None:
    """Make ready; called once, before anything heavy is imported."""
    import gc

    import _frozen  # a built-in module, packaging/executable/src/main.rs

    # With the usual 700 a command spends a fifth of its start looking for garbage among classes that stay. An agent goes
    # back to it once it is ready.
    gc.set_threshold(50_000)
    for stream in _frozen.closed:
        setattr(sys, stream, None)  # as Python has it where nobody opens /dev/null beforehand
    _import_later("inspect", known={"cleandoc": cleandoc})
    _import_later("difflib", known={"get_close_matches": _close_matches})
    _import_later("platform", known={"system": lambda: os.uname().sysname})
    _import_later("dataclasses", then=_take_compiled)
    # No package's metadata is in the file; tabulate asks for its own, and pays for email and zipfile to be told so.
    _import_later(
        "importlib.metadata", known={"version": _no_metadata, "PackageNotFoundError": ModuleNotFoundError}
    )
    libraries = {name: where for name, where in _frozen.parts.items() if name != MODULES}
    sys.meta_path.insert(0, Libraries(libraries, memfd=_frozen.memfd_create, damage=_frozen.damage))


def leave(code: int) -> NoReturn:
    """End the process with its exit functions run and its output flushed. Threads have been joined by now."""
    import atexit

    atexit._run_exitfuncs()  # noqa: SLF001  the demo takes its hosts down there
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            pass  # cli.main has flushed and judged stdout; here nobody is left to tell
    if os.environ.get(SHOW_MODULES):
        os.write(2, "".join(f"{name}\n" for name in sys.modules).encode())
    os._exit(code)


class _Later:
    """Stands in sys.modules for a module until something of it is used that it does not know."""

    def __init__(
        self, name: str, known: dict[str, object], then: Callable[[ModuleType], None] | None
    ) -> None:
        self.__dict__.update(known, __name__=name, __spec__=None, _then=then)

    def __getattr__(self, wanted: str) -> object:
        if wanted == "__path__":
            raise AttributeError(wanted)  # `from x import y` asks whether x is a package
        name = str(self.__dict__["__name__"])
        if sys.modules.get(name) is self:  # type: ignore[comparison-overlap]
            del sys.modules[name]
            __import__(name)
            if then := self.__dict__["_then"]:
                then(sys.modules[name])
        return getattr(sys.modules[name], wanted)


def _import_later(
    name: str, *, known: dict[str, object] | None = None, then: Callable[[ModuleType], None] | None = None
) -> None:
    """Import `name` when it is used, and then call `then` with it.

    click imports inspect (with ast, dis, tokenize) for one function, uuid imports platform for another: a quarter of
    click's import. `known` are those functions.
    """
    sys.modules[name] = _Later(name, known or {}, then)  # type: ignore[assignment]  # it behaves like one


def _no_metadata(package: str) -> NoReturn:
    raise ModuleNotFoundError(f"No package metadata was found for {package}", name=package)


def _take_compiled(dataclasses: ModuleType) -> None:
    """Let @dataclass find its methods compiled; what was not seen when we were built is compiled now."""
    from _frozen_importlib_external import MAGIC_NUMBER

    try:
        from flanctl._compiled import CODE, MAGIC
    except ImportError:
        return
    if MAGIC != MAGIC_NUMBER:
        return
    from marshal import loads

    def run(text: str, names: dict[str, object], into: dict[str, object]) -> None:
        code = CODE.get(text)
        exec(text if code is None else loads(code), names, into)  # noqa: S102, S302  our own, out of our own file

    vars(dataclasses)["exec"] = run


def _close_matches(word: str, possibilities: Sequence[str], n: int = 3, cutoff: float = 0.6) -> list[str]:
    """difflib's, but for short options: before click takes `-f` for one it asks which long option might be meant."""
    if len(word) == 2 and word[0] == "-":
        return []
    from difflib import SequenceMatcher  # noqa: F401  imports it, in place of what stood for it

    return sys.modules["difflib"].get_close_matches(word, possibilities, n, cutoff)  # type: ignore[no-any-return]


def cleandoc(doc: str) -> str:
    """What inspect.cleandoc does (PEP 257): the margin of all lines but the first, and empty lines at the ends, go."""
    lines = doc.expandtabs().split("\n")
    margins = [len(line) - len(line.lstrip()) for line in lines[1:] if line.lstrip()]
    margin = min(margins, default=0)
    lines = [lines[0].lstrip(), *(line[margin:] for line in lines[1:])]
    while lines and not lines[-1]:
        lines.pop()
    while lines and not lines[0]:
        lines.pop(0)
    return "\n".join(lines)


class Libraries:
    """Meta-path finder for shared libraries that are parts of a file: module name → offset and length in it.

    The dynamic loader loads files, so a library's bytes are copied (by the kernel, sendfile) into a file without a name, which
    is loaded as /proc/self/fd/N. Its descriptor stays open for the life of the process: the loader knows a library by its
    path, and a second one under a number that was used before would silently be the first.
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[int, int]],
        *,
        executable: str = "/proc/self/exe",
        memfd: Callable[[str, int], int] | None = None,
        folders: Sequence[str] = FOLDERS,
        damage: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.parts, self.executable, self.folders = parts, executable, folders
        self.memfd = memfd or os.memfd_create
        self.damage = damage
        self.origins: dict[str, str] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The import system's question. Raises ImportError where the library is known but no place to load it from is.

        What it is told to load with raises ImportError where the dynamic loader refuses (a library of the host is missing), and
        FlanctlError where that is because the executable is not as it was made: `damage` says so.
        """
        del path, target
        if fullname not in self.parts:
            return None
        if fullname not in self.origins:
            self.origins[fullname] = self._materialise(fullname)
        from importlib.machinery import ExtensionFileLoader
        from importlib.util import spec_from_file_location

        damage = self.damage

        class Loader(ExtensionFileLoader):
            def create_module(self, spec: ModuleSpec) -> ModuleType:
                try:
                    return super().create_module(spec)
                except ImportError as error:
                    if not (why := damage()):
                        raise
                    from flanctl.errors import FlanctlError

                    raise FlanctlError(
                        f"this file is damaged: {why}",
                        hint="copy it again and compare it with flanctl.sha256",
                        id="damaged",
                    ) from error

        origin = self.origins[fullname]
        return spec_from_file_location(fullname, origin, loader=Loader(fullname, origin))

    def _materialise(self, name: str) -> str:
        places: list[tuple[str, Callable[[], int]]] = [
            ("memory", lambda: self.memfd(name, CLOEXEC | EXEC)),
            ("memory", lambda: self.memfd(name, CLOEXEC)),
        ]
        for folder in self.folders:
            places.append((folder, lambda folder=folder: _unlinked_file(folder)))  # type: ignore[misc]  # noqa: PERF401
        failures = []
        for where, make in places:
            descriptor = -1
            try:
                descriptor = make()
                self._fill(descriptor, *self.parts[name])
                _refuse_noexec(descriptor)
            except OSError as error:
                failures.append(f"{where}: {error.strerror or error}")
                if descriptor >= 0:
                    os.close(descriptor)  # nothing was loaded under this number yet
                continue
            return f"/proc/self/fd/{descriptor}"
        raise ImportError(f"no place to load {name} from ({'; '.join(failures)})", name=name)

    def _fill(self, descriptor: int, offset: int, length: int) -> None:
        source = os.open(self.executable, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while length:
                sent = os.sendfile(descriptor, source, offset, length)
                if not sent:
                    raise OSError(f"{self.executable} ends too early")
                offset, length = offset + sent, length - sent
        finally:
            os.close(source)


def _unlinked_file(folder: str) -> int:
    path = f"{folder}/.flanctl-{os.getpid()}-{os.urandom(8).hex()}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o700)
    os.unlink(path)
    return descriptor


def _refuse_noexec(descriptor: int) -> None:
    """Fail here, where the next place can be tried, if the file must not be mapped executable."""
    import mmap

    mmap.mmap(descriptor, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()
