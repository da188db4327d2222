"""`python -m bench.startup URL ROUNDS`: whole commands, in turn, on the host it is run on; prints JSON.

The frozen file is measured as it is installed (a copy written in small pieces, as scp and dpkg write it), beside the same
program from the source tree, etcdctl asking the same, and a shell script that does what mk-docker-opts.sh does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FROZEN = Path(os.environ.get("FLANCTL_EXE", "dist/flanctl"))
SUBNET_ENV = (
    "FLANNEL_NETWORK=172.17.0.0/16\nFLANNEL_SUBNET=172.17.41.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
)


def commands(folder: Path, url: str) -> dict[str, list[str]]:
    """What is compared, by name."""
    subnet_env = folder / "subnet.env"
    subnet_env.write_text(SUBNET_ENV)
    files = ["-f", str(subnet_env), "-d", str(folder / "docker")]
    listed = ["subnets", "ls", "-w", "simple", "--endpoints", url]
    venv = [sys.executable, "-m", "flanctl"]
    found = {
        "nothing (/bin/true)": ["/bin/true"],
        "etcdctl version": ["etcdctl", "version"],
        "etcdctl get --prefix": [
            "etcdctl",
            f"--endpoints={url}",
            "get",
            "--prefix",
            "/jxdd/network/subnets/",
        ],
        "shell script (dash)": ["dash", "bench/docker_options.sh", *files],
        "venv version": [*venv, "version"],
        "venv subnets ls": [*venv, *listed],
        "venv docker-opts": [*venv, "docker-opts", *files],
    }
    if FROZEN.exists():
        frozen, script = folder / "flanctl", folder / "mk-docker-opts.sh"
        with FROZEN.open("rb") as source, frozen.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 15)
        frozen.chmod(0o755)
        script.symlink_to(frozen)
        found |= {
            "frozen version": [str(frozen), "version"],
            "frozen version -w simple": [str(frozen), "version", "-w", "simple"],
            "frozen subnets ls": [str(frozen), *listed],
            "frozen docker-opts": [str(frozen), "docker-opts", *files],
            "frozen mk-docker-opts.sh": [str(script), *files],
        }
    return found


def main() -> int:
    url, rounds = sys.argv[1], int(sys.argv[2])
    env = dict(os.environ) | {"ETCDCTL_API": "3"}
    wall: dict[str, list[float]] = {}
    resident: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="flanctl-bench-") as name:
        compared = commands(Path(name), url)
        for round_ in range(rounds + 1):
            for what, command in compared.items():
                began = time.monotonic()
                process = subprocess.Popen(
                    command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env
                )
                assert process.stderr is not None
                said = process.stderr.read()
                _, status, usage = os.wait4(process.pid, 0)
                took = (time.monotonic() - began) * 1000
                process.returncode = os.waitstatus_to_exitcode(status)
                assert process.returncode == 0, (command, said)
                if round_:  # the first warms the page cache
                    wall.setdefault(what, []).append(took)
                    resident[what] = max(resident.get(what, 0.0), usage.ru_maxrss / 1024)
    size = FROZEN.stat().st_size / 1e6 if FROZEN.exists() else None
    print(json.dumps({"wall_ms": wall, "resident_mib": resident, "frozen_megabytes": size}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
