"""Pack a statically built CPython as PyOxidizer takes it.

The layout is version 7 of what python-build-standalone documents: PYTHON.json, `install` (a prefix) and `build` (object
files and static libraries that PyOxidizer links anew). Every object belongs to the core; Setup.local decides which extension
modules exist, LIBRARIES_OF which static libraries they bring along. Same input, same bytes.
"""

from __future__ import annotations

import json
import pprint
import re
import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# PyOxidizer links a static library only through the extension module that names it, never for the core.
LIBRARIES_OF = {
    "_ssl": ("ssl", "crypto"),
    "_hashlib": ("ssl", "crypto"),
    "_ctypes": ("ffi",),
    "zlib": ("z",),
    "binascii": ("z",),
    "_bz2": ("bz2",),
    "_lzma": ("lzma",),
    "_sqlite3": ("sqlite3",),
    "_decimal": ("mpdec",),
    "pyexpat": ("expat",),
    "_elementtree": ("expat",),
}
BUNDLED = {"mpdec": "Modules/_decimal/libmpdec/libmpdec.a", "expat": "Modules/expat/libexpat.a"}
LEFT_OUT = (
    "test",
    "idlelib",
    "tkinter",
    "turtledemo",
    "lib2to3",
    "ensurepip",
    "pydoc_data",
    "lib-dynload",
    "config-3.11-x86_64-linux-gnu",
)
DESCRIBE = """
import importlib.machinery as m, importlib.util, json, sys, sysconfig
print(json.dumps({
    "tag": sys.implementation.cache_tag, "hex": sys.implementation.hexversion,
    "version": list(map(str, sys.version_info)), "magic": importlib.util.MAGIC_NUMBER.hex(),
    "suffixes": {"bytecode": m.BYTECODE_SUFFIXES, "debug_bytecode": m.DEBUG_BYTECODE_SUFFIXES,
                 "extension": m.EXTENSION_SUFFIXES, "optimized_bytecode": m.OPTIMIZED_BYTECODE_SUFFIXES,
                 "source": m.SOURCE_SUFFIXES},
    "config": {name: str(value) for name, value in sysconfig.get_config_vars().items()},
}))
"""


def write_distribution(
    *,
    source: Path,
    prefix: Path,
    libraries: Path,
    hidden: str,
    archive: Path,
    scratch: Path,
    run: Callable[..., str],
) -> None:
    """`source` is the built tree, `prefix` what `make install` made; every `hidden` path is written as /build."""
    top = scratch / "python"
    top.mkdir(parents=True)
    install = _copy_prefix(prefix, top, hidden, run)
    objects = _copy_objects(source, top, run)
    modules = _modules(source)
    _copy_libraries(source, libraries, top, modules)
    (top / "licenses").mkdir()
    shutil.copy(source / "LICENSE", top / "licenses" / "LICENSE.cpython.txt")
    about = json.loads(run(install / "bin/python3.11", "-I", "-B", "-c", DESCRIBE))
    text = json.dumps(_description(about, objects, modules), indent=1, sort_keys=True)
    (top / "PYTHON.json").write_text(text.replace(hidden, "/build"))
    pack = [
        "tar",
        "--sort=name",
        "--mtime=@0",
        "--owner=0",
        "--group=0",
        "--numeric-owner",
        "--mode=go=rX,u+rw,a-s",
    ]
    run(
        "bash",
        "-o",
        "pipefail",
        "-c",
        f"{' '.join(pack)} -C '{scratch}' -cf - python | zstd -q -f -3 -o '{archive}'",
    )


def _copy_prefix(prefix: Path, top: Path, hidden: str, run: Callable[..., str]) -> Path:
    install = top / "install"
    unwanted = shutil.ignore_patterns("__pycache__", "libpython3.11.a", *LEFT_OUT)
    shutil.copytree(prefix, install, symlinks=True, ignore=unwanted)
    (install / "lib/python3.11/lib-dynload").mkdir()  # getpath looks for it
    run("strip", "--strip-debug", install / "bin/python3.11")
    for data in install.glob("lib/python3.11/_sysconfigdata*.py"):
        # It holds the paths of the build. Written anew as well: its lines were broken where long paths made them so.
        names: dict[str, Any] = {}
        exec(data.read_text(), names)  # CPython's own file, of this very build
        values = {
            name: value.replace(hidden, "/build") if isinstance(value, str) else value
            for name, value in names["build_time_vars"].items()
        }
        data.write_text(f"build_time_vars = {pprint.pformat(values)}\n")
    return install


def _copy_objects(source: Path, top: Path, run: Callable[..., str]) -> list[str]:
    """Every object of libpython but the table of built-in modules, which PyOxidizer writes anew."""
    listed = run("make", "-s", "-C", source, "--eval", "show-objects:;@echo $(LIBRARY_OBJS)", "show-objects")
    objects = []
    for name in dict.fromkeys(listed.split()):
        if not name.endswith(".o") or name == "Modules/config.o":
            continue
        target = top / "build" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, target)
        run("strip", "--strip-debug", target)
        objects.append(f"build/{name}")
    for name in ("config.o", "config.c"):
        shutil.copy(source / "Modules" / name, top / "build/Modules" / name)
    return objects


def _modules(source: Path) -> dict[str, list[dict[str, Any]]]:
    """The built-in modules as CPython's build has listed them."""
    table = re.findall(r'\{"(\w+)", (\w+)\}', (source / "Modules/config.c").read_text())
    return {
        name: [
            {
                "in_core": name not in LIBRARIES_OF,
                "init_fn": function,
                "licenses": None,
                "license_paths": None,
                "license_public_domain": None,
                "objs": [],
                "required": True,
                "static_lib": None,
                "shared_lib": None,
                "variant": "default",
                "links": [
                    {"name": library, "path_static": f"build/lib/lib{library}.a"}
                    for library in LIBRARIES_OF.get(name, ())
                ],
            }
        ]
        for name, function in table
    }


def _copy_libraries(
    source: Path, libraries: Path, top: Path, modules: dict[str, list[dict[str, Any]]]
) -> None:
    target = top / "build/lib"
    target.mkdir(parents=True)
    for name in sorted({link["name"] for variants in modules.values() for link in variants[0]["links"]}):
        path = source / BUNDLED[name] if name in BUNDLED else libraries / f"lib{name}.a"
        shutil.copy(path, target / f"lib{name}.a")


def _description(
    about: dict[str, Any], objects: list[str], modules: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    library = "install/lib/python3.11"
    return {
        "version": "7",
        "target_triple": "x86_64-unknown-linux-gnu",
        "optimizations": "noopt",
        "python_tag": "cp311",
        "python_abi_tag": "cp311",
        "python_platform_tag": "linux-x86_64",
        "python_implementation_name": "cpython",
        "python_implementation_cache_tag": about["tag"],
        "python_implementation_hex_version": about["hex"],
        "python_implementation_version": about["version"],
        "python_version": ".".join(about["version"][:3]),
        "python_major_minor_version": ".".join(about["version"][:2]),
        "python_exe": "install/bin/python3.11",
        "python_stdlib_test_packages": ["test"],
        "python_suffixes": about["suffixes"],
        "python_bytecode_magic_number": about["magic"],
        "python_symbol_visibility": "global-default",
        "python_extension_module_loading": ["builtin", "shared-library"],
        "python_config_vars": about["config"],
        "python_paths_abstract": {},
        "python_paths": {
            "data": "install",
            "scripts": "install/bin",
            "stdlib": library,
            "platstdlib": library,
            "include": "install/include/python3.11",
            "platinclude": "install/include/python3.11",
            "purelib": f"{library}/site-packages",
            "platlib": f"{library}/site-packages",
        },
        "libpython_link_mode": "static",
        "crt_features": ["glibc-dynamic"],
        "run_tests": "build/run_tests.py",
        "build_info": {
            "core": {
                "objs": objects,
                "links": [{"name": name, "system": True} for name in ("m", "dl", "pthread", "util", "rt")],
                "shared_lib": None,
                "static_lib": None,
            },
            "extensions": modules,
            "inittab_object": "build/Modules/config.o",
            "inittab_source": "build/Modules/config.c",
            "inittab_cflags": [
                "-std=c11",
                "-DNDEBUG",
                "-DPy_BUILD_CORE",
                "-Iinstall/include/python3.11",
                "-Iinstall/include/python3.11/internal",
            ],
            "object_file_format": "elf",
        },
        "licenses": ["Python-2.0"],
        "license_path": "licenses/LICENSE.cpython.txt",
        "tcl_library_path": None,
        "tcl_library_paths": None,
    }
