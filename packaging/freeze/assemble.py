"""Put the modules and shared libraries behind the program. `packaging/executable/src/parts.rs` reads what this writes."""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAGIC = b"flanctl parts 1\n"
ALIGNMENT = 4096
"""A page: the parts are mapped."""


def assemble(program: Path, parts: Mapping[str, Path], out: Path) -> None:
    """Write program, parts, table and trailer to `out`, executable for all."""
    content = bytearray(program.read_bytes())
    table = bytearray()
    for name, path in parts.items():
        content += bytes(-len(content) % ALIGNMENT)
        part = path.read_bytes()
        encoded = name.encode()
        if len(encoded) > 40:
            raise ValueError(f"the name of a part is too long: {name}")
        table += struct.pack("<40sQQ", encoded, len(content), len(part))
        content += part
    content += table
    digest = hashlib.sha256(content).digest()
    size = len(content) + 64
    content += digest + struct.pack("<QQ", size, len(parts)) + MAGIC
    out.write_bytes(content)
    out.chmod(0o755)
