"""Write flanctl/_compiled.py: the methods that dataclasses makes of every class, compiled, and the units' texts.

    python compiled.py ROOT OUT

`@dataclass` writes Python source for __init__, __eq__ and so on and compiles it at each start: a millisecond for a class, and
a command has thirty. The sources are the same each time, so they are compiled here once; `flanctl/frozen.py` hands them out.
The units (packaging/systemd) are what `flanctl install` writes; PyOxidizer would put files of a package in random order.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import marshal
import pkgutil
import sys
from pathlib import Path
from typing import Any

SKIPPED = {"flanctl.__main__", "flanctl._native"}
"""They run when they are imported, or are not Python."""


def main(root: str, out: str) -> None:
    """Import every module of flanctl below `root` and write what dataclasses compiled meanwhile."""
    sys.path.insert(0, root)
    compiled: dict[str, bytes] = {}

    def remember(text: str, names: dict[str, Any], into: dict[str, Any]) -> None:
        code = compile(text, "<dataclass>", "exec", dont_inherit=True, optimize=1)
        compiled[text] = marshal.dumps(code)
        exec(code, names, into)

    vars(dataclasses)["exec"] = remember
    import flanctl

    for module in pkgutil.walk_packages(flanctl.__path__, "flanctl."):
        if module.name not in SKIPPED:
            importlib.import_module(module.name)
    lines = [f"    {text!r}: {compiled[text]!r}," for text in sorted(compiled)]
    head = '"""Written by `make freeze` (packaging/freeze/compiled.py)."""\n\n'
    magic = f"MAGIC = {importlib.util.MAGIC_NUMBER!r}\n"
    units = {path.name: path.read_text() for path in sorted(Path(root, "packaging/systemd").iterdir())}
    Path(out).write_text(f"{head}{magic}UNITS = {units!r}\nCODE = {{\n" + "\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
