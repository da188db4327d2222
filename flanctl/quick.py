"""`flanctl subnets ls` in its plain form, understood without click, whose import is most of so short a command's time.

Scripts ask it again and again. What is not plain (help, completion, --debug, an option in another place or form) is left to
cli.py; what both understand they understand alike, which tests/unit/test_quick.py checks word by word.
"""

from __future__ import annotations

import os

from flanctl.complaint import complain, ended
from flanctl.settings import REGISTRY, WRITE_OUT, resolve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from flanctl.errors import FlanctlError

NAMES = {
    name: row.name
    for row in REGISTRY
    if row.kind != "switch" and not row.repeatable
    for name in (row.flag, f"--{row.flanneld}" if row.flanneld else row.flag)
} | {"--write-out": WRITE_OUT.name, "-w": WRITE_OUT.name}


def flags(words: Sequence[str]) -> dict[str, str] | None:
    """What the words set, by setting name; None where they are not all `--name value` or `--name=value`."""
    found: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        if name not in NAMES:
            return None
        if not equals:
            value = next(rest, "-")
            if value.startswith("-"):
                return None
        found[NAMES[name]] = value
    return found


def subnets_ls(words: Sequence[str]) -> int | None:
    """Run `flanctl subnets ls` with these words behind it; its exit code, or None where cli.py must."""
    given = flags(words)
    if given is None or "_FLANCTL_COMPLETE" in os.environ:
        return None
    form = given.pop(WRITE_OUT.name, os.environ.get(WRITE_OUT.variable, "table"))
    if form not in WRITE_OUT.choices:
        return None

    def run() -> int:
        from flanctl.commands import output
        from flanctl.commands.lease_view import look, show
        from flanctl.registry.session import session

        def hear(sentence: str, warning: bool) -> None:
            if warning:
                output.warning(sentence)

        with session(resolve(given), say=hear) as registry:
            view = look(registry)
        show(view, form)
        return 0

    def say(error: FlanctlError) -> None:
        complain("flanctl subnets ls", error, form=form)

    return ended(run, say)
