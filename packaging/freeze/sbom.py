"""The list of parts (CycloneDX 1.5): every Python package, Rust crate and C library in the file, with version and licence."""

from __future__ import annotations

import email.parser
import hashlib
import json
import re
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from toolchain import TARGET

if TYPE_CHECKING:
    from pathlib import Path

    from application import Freeze

# Debian's copyright files are prose; these are the licences of what is compiled in.
LICENCE_OF_SOURCE = {
    "zlib": "Zlib",
    "bzip2": "bzip2-1.0.6",
    "xz-utils": "LicenseRef-public-domain",  # liblzma alone
    "libffi": "MIT",
    "sqlite3": "blessing",
    "openssl": "Apache-2.0",
    "python3.11": "Python-2.0",
}
# What those sources and wheels carry inside, in the version of their carrier.
CARRIED = {
    "python3.11": {"expat": "MIT", "libmpdec": "BSD-2-Clause"},
    # third_party of grpcio 1.85.1's source archive
    "grpcio": {
        "abseil-cpp": "Apache-2.0",
        "address_sorting": "BSD-3-Clause",
        "boringssl": "Apache-2.0",
        "c-ares": "MIT",
        "re2": "BSD-3-Clause",
        "upb": "BSD-3-Clause",
        "utf8_range": "MIT",
        "xxhash": "BSD-2-Clause",
        "zlib": "Zlib",
    },
    # what it links into every program
    "ziglang": {"compiler-rt": "MIT", "libunwind": "Apache-2.0 WITH LLVM-exception"},
}
CLASSIFIED = {
    "Apache Software License": "Apache-2.0",
    "MIT License": "MIT",
    "BSD License": "BSD-3-Clause",
    "Python Software Foundation License": "PSF-2.0",
}


def write_sbom(job: Freeze, dependencies: Path, executable: Path, out: Path) -> None:
    """Same build, same bytes: the serial number comes from the executable's hash, the date from its build date."""
    digest = hashlib.sha256(executable.read_bytes()).hexdigest()
    components = [*_c_parts(job), *python_parts(dependencies / "stage"), *_rust_parts(job)]
    components.sort(key=lambda part: (part["group"], part["name"], part["version"]))
    about = {
        "type": "application",
        "name": "flanctl",
        "version": _own_version(job.root),
        "licenses": [{"expression": "Apache-2.0"}],
        "hashes": [{"alg": "SHA-256", "content": digest}],
        "properties": [{"name": "flanctl:revision", "value": job.build.revision}],
    }
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.UUID(digest[:32])}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(job.build.epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": about,
        },
        "components": components,
    }
    out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _own_version(root: Path) -> str:
    found = re.search(r'__version__ = "([^"]+)"', (root / "flanctl/__init__.py").read_text())
    return found[1] if found else "unknown"


def _part(
    group: str, name: str, version: str, licence: str, purl: str = "", carrier: str = ""
) -> dict[str, Any]:
    part: dict[str, Any] = {
        "type": "library",
        "group": group,
        "name": name,
        "version": version,
        "licenses": [{"expression": licence}],
    }
    if purl:
        part["purl"] = purl
        part["bom-ref"] = purl
    if carrier:
        part["properties"] = [{"name": "flanctl:carried-by", "value": carrier}]
    return part


def _carried(carrier: str, version: str) -> list[dict[str, Any]]:
    return [
        _part("c", name, f"of {carrier} {version}", licence, carrier=carrier)
        for name, licence in CARRIED.get(carrier, {}).items()
    ]


def _c_parts(job: Freeze) -> list[dict[str, Any]]:
    parts = []
    for name, source in job.locked.items():
        purl = f"pkg:deb/debian/{name}@{quote(source.version, safe=':~')}?arch=source&distro=bookworm"
        parts.append(_part("c", name, source.version, LICENCE_OF_SOURCE[name], purl))
        parts.extend(_carried(name, source.version))
    zig = next(job.tools.folder.glob("ziglang-*.dist-info")).name.removesuffix(".dist-info")
    parts.extend(_carried(*zig.split("-")))
    return parts


def python_parts(stage: Path) -> list[dict[str, Any]]:
    """The packages of the stage by their metadata, and what they carry inside (that has no purl)."""
    parts = []
    for path in sorted(stage.glob("*.dist-info/METADATA")):
        metadata = email.parser.Parser().parsestr(path.read_text())
        name, version = metadata["Name"], metadata["Version"]
        classes = [text.rpartition(" :: ")[2] for text in metadata.get_all("Classifier", [])]
        licence = (
            metadata["License-Expression"]
            or next((CLASSIFIED[text] for text in classes if text in CLASSIFIED), None)
            or CLASSIFIED.get(metadata["License"] or "", metadata["License"] or "LicenseRef-unknown")
        )
        normal = re.sub(r"[-_.]+", "-", name).lower()
        parts.append(_part("pypi", name, version, _expression(licence), f"pkg:pypi/{normal}@{version}"))
        parts.extend(_carried(name, version))
    return parts


def _rust_parts(job: Freeze) -> list[dict[str, Any]]:
    """The crates that are linked in: not those that only build or test (macros, build scripts, proptest)."""
    std = job.tools.rust.split()[1]
    found = {("std", std): _part("rust", "std", std, "MIT OR Apache-2.0", f"pkg:generic/rust-std@{std}")}
    for crate in (job.root / "native", job.root / "packaging/executable"):
        command = ["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", TARGET]
        listed = json.loads(job.cache.run("sbom", command, cwd=crate))
        packages = {package["id"]: package for package in listed["packages"]}
        for package in map(packages.__getitem__, _linked(listed, packages)):
            if package["source"] is None:
                continue
            name, version = package["name"], package["version"]
            licence = _expression(package["license"] or "LicenseRef-file")
            found[name, version] = _part("crates.io", name, version, licence, f"pkg:cargo/{name}@{version}")
    return list(found.values())


def _linked(listed: dict[str, Any], packages: dict[str, Any]) -> set[str]:
    """The ids that the workspace's own crates reach by normal dependencies, from `cargo metadata`."""
    needs = {
        node["id"]: [
            need["pkg"] for need in node["deps"] if any(kind["kind"] is None for kind in need["dep_kinds"])
        ]
        for node in listed["resolve"]["nodes"]
    }
    reached: set[str] = set()
    waiting = list(listed["workspace_members"])
    while waiting:
        crate = waiting.pop()
        macro = any("proc-macro" in target["kind"] for target in packages[crate]["targets"])
        if crate not in reached and not macro:
            reached.add(crate)
            waiting.extend(needs[crate])
    return reached


def _expression(licence: str) -> str:
    """An SPDX expression of what authors wrote: `MIT/Apache-2.0`, `Apache License 2.0`."""
    licence = licence.strip().replace("/", " OR ")
    named = {
        "Apache License 2.0": "Apache-2.0",
        "Apache 2.0": "Apache-2.0",
        "3-Clause BSD License": "BSD-3-Clause",
    }
    licence = named.get(licence, licence)
    return (
        licence
        if re.fullmatch(r"[\w.+\-]+( (AND|OR|WITH) [\w.+\-()]+| [()])*|\(.*\).*", licence)
        else "LicenseRef-" + re.sub(r"\W+", "-", licence)
    )
