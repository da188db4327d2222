"""flanneld-start by name: the CentOS package's script, which turns /etc/sysconfig/flanneld into flags.

    FLANNEL_ETCD_ENDPOINTS=… FLANNEL_ETCD_PREFIX=… flanneld-start --iface=eth0

It goes on as flanneld in the same process, which also bears that name for `pgrep -x flanneld`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from flanctl.compat import flanneld

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SYSCONFIG = "/etc/sysconfig/flanneld"


def main(words: Sequence[str]) -> int:
    """The exit code of flanneld, or 2 where the variables give it nothing to start with."""
    try:
        flags = flags_from(os.environ, words)
    except LookupError as error:
        flanneld.say(f"flanneld-start: {error.args[0]}\n")
        return 2
    try:
        with open("/proc/self/comm", "w") as name:
            name.write("flanneld")
    except OSError:
        pass
    return flanneld.main([*flags, *words], program="flanneld-start")


def flags_from(environment: Mapping[str, str], words: Sequence[str] = ()) -> list[str]:
    """The two flags the script makes; the older name of each variable counts where the newer is empty.

    Raises LookupError, its text naming variable and file, for one that is empty; the script would start flanneld with
    `-etcd-endpoints=`. Not where the words bring the flag themselves: they come later and win.
    """
    flags = []
    for flag, newer, older in (
        ("etcd-endpoints", "FLANNEL_ETCD_ENDPOINTS", "FLANNEL_ETCD"),
        ("etcd-prefix", "FLANNEL_ETCD_PREFIX", "FLANNEL_ETCD_KEY"),
    ):
        text = environment.get(newer) or environment.get(older) or ""
        if text:
            flags.append(f"-{flag}={text}")
        elif not any(word.lstrip("-").partition("=")[0] in {flag, "help", "h", "version"} for word in words):
            raise LookupError(f"{newer} is empty or not set; give it in {SYSCONFIG}")
    return flags
