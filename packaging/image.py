"""The container image: one tar that is both an OCI image layout and what `docker load` has always read.

    layer 1   Debian's libc6, libstdc++6, iptables, ca-certificates and what they need; no shell, no package manager
    layer 2   /usr/bin/flanctl

The bytes follow from dist/flanctl, the source tree and the Debian packages' versions, which the image names itself in
/var/lib/dpkg/status.d, where scanners look. Nothing of the building machine is in it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

BASE = (
    "--variant=extract",
    "--include=base-files,netbase,libc6,libstdc++6,iptables,ca-certificates",
    # Packages are unpacked, not configured, so dpkg itself keeps no list of them.
    """--extract-hook=mkdir "$1/var/lib/dpkg/status.d"
    for deb in "$1"/var/cache/apt/archives/*.deb; do
        dpkg-deb -f "$deb" >"$1/var/lib/dpkg/status.d/$(dpkg-deb -f "$deb" Package)"
    done""",
)
"""Arguments of scripts/debian-tree."""

# apt's and dpkg's own files and the building machine's; a container brings its /dev, host name and resolver.
_DROPPED = (
    "dev/",
    "etc/apt/",
    "etc/dpkg/",
    "etc/hostname",
    "etc/resolv.conf",
    "var/cache/",
    "var/lib/apt/",
    "var/log/",
    "var/lib/dpkg/",
)
_KEPT = "var/lib/dpkg/status.d/"
_CERTIFICATES = "usr/share/ca-certificates/mozilla/"
# What the packages' configuration would have made.
_FILES = {
    "etc/passwd": b"root:x:0:0:root:/root:/usr/sbin/nologin\n",
    "etc/group": b"root:x:0:\n",
    "etc/nsswitch.conf": b"passwd: files\ngroup: files\nhosts: files dns\nprotocols: files\nservices: files\n",
}
_LINKS = {
    f"usr/sbin/{name}": "xtables-nft-multi"
    for family in ("iptables", "ip6tables")
    for name in (family, f"{family}-save", f"{family}-restore")
}


def write(target: Path, *, base: Path, executable: Path, version: str, arch: str, epoch: int) -> None:
    """Write the image's tar to `target`. `arch` is Go's word (amd64), `epoch` its time of creation in seconds."""
    layers = [_base_layer(base), _executable_layer(executable)]
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch))
    config = {
        "architecture": arch,
        "os": "linux",
        "created": created,
        "config": {
            "Entrypoint": ["/usr/bin/flanctl"],
            "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "WorkingDir": "/",
            "Labels": {
                "org.opencontainers.image.title": "flanctl",
                "org.opencontainers.image.version": version,
                "org.opencontainers.image.licenses": "Apache-2.0",
                "org.opencontainers.image.created": created,
            },
        },
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer) for layer in layers]},
        "history": [
            {"created": created, "created_by": text} for text in ("Debian packages", "/usr/bin/flanctl")
        ],
    }
    packed = [gzip.compress(layer, 6, mtime=0) for layer in layers]
    blobs: dict[str, bytes] = {}
    layer_type, oci = "application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.oci.image"
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": f"{oci}.manifest.v1+json",
        "config": _blob(blobs, _json(config), f"{oci}.config.v1+json"),
        "layers": [_blob(blobs, layer, layer_type) for layer in packed],
    }
    described = _blob(blobs, _json(manifest), f"{oci}.manifest.v1+json")
    described["platform"] = {"architecture": arch, "os": "linux"}
    described["annotations"] = {
        "io.containerd.image.name": f"docker.io/library/flanctl:{version}",
        "org.opencontainers.image.ref.name": version,
    }
    docker = {
        "Config": _path(manifest["config"]),
        "RepoTags": [f"flanctl:{version}", "flanctl:latest"],
        "Layers": [_path(layer) for layer in manifest["layers"]],
    }
    files = {
        "oci-layout": _json({"imageLayoutVersion": "1.0.0"}),
        "index.json": _json({"schemaVersion": 2, "manifests": [described]}),
        "manifest.json": _json([docker]),
        **{f"blobs/sha256/{name}": content for name, content in sorted(blobs.items())},
    }
    with target.open("wb") as stream:
        stream.write(_tar(files))


def _base_layer(base: Path) -> bytes:
    certificates: dict[str, bytes] = {}
    out = io.BytesIO()
    with tarfile.open(base) as tar, tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as layer:
        for member in tar:
            name = member.name.removeprefix("./")
            if f"{name}/".startswith(_DROPPED) and not f"{name}/".startswith(_KEPT):
                continue
            content = tar.extractfile(member).read() if member.isreg() else b""  # type: ignore[union-attr]
            if name.startswith(_CERTIFICATES) and name.endswith(".crt"):
                certificates[name] = content
            member.name, member.mtime, member.uname, member.gname = name or ".", 0, "", ""
            layer.addfile(member, io.BytesIO(content))
        bundle = b"".join(content.rstrip(b"\n") + b"\n" for _, content in sorted(certificates.items()))
        for name, content in sorted({**_FILES, "etc/ssl/certs/ca-certificates.crt": bundle}.items()):
            _add(layer, name, content)
        for name, destination in sorted(_LINKS.items()):
            link = tarfile.TarInfo(name)
            link.type, link.linkname, link.mode = tarfile.SYMTYPE, destination, 0o777
            layer.addfile(link)
    return out.getvalue()


def _executable_layer(executable: Path) -> bytes:
    return _tar({"usr/bin/flanctl": executable.read_bytes()}, mode=0o755)


def _tar(files: Mapping[str, bytes], *, mode: int = 0o644) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files.items():
            _add(tar, name, content, mode)
    return out.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), mode
    tar.addfile(member, io.BytesIO(content))


def _blob(blobs: dict[str, bytes], content: bytes, media_type: str) -> dict[str, Any]:
    digest = _digest(content)
    blobs[digest.removeprefix("sha256:")] = content
    return {"mediaType": media_type, "digest": digest, "size": len(content)}


def _path(described: Any) -> str:
    return "blobs/" + str(described["digest"]).replace(":", "/")


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
