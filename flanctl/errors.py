"""Every error a user may meet, and the exit code each one ends the program with.

An error says what was done, to what, what happened and what to try:

    raise NotFound(
        "no config at /jxdd/network/config",
        hint="flanctl net init --network 172.17.0.0/16",
    )

Only `cli.py`, and `compat/` for flannel's names, turn one into text and an exit code. Libraries' own exceptions
never leave the module that is the library's door.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost mk-docker-opts.sh more than all of its work
if TYPE_CHECKING:
    from typing import ClassVar


class FlanctlError(Exception):
    """Something went wrong and we know what.

    `message` is one sentence without the command's name and without a full stop. `details` are lines shown
    indented below it. `hint` is a command or an action, shown after `try:`. `id` is a stable word for scripts
    (`-w json` prints it); the class gives a default.
    """

    exit_code: ClassVar[int] = 1
    default_id: ClassVar[str] = "error"

    def __init__(
        self,
        message: str,
        *,
        details: tuple[str, ...] = (),
        hint: str | None = None,
        id: str | None = None,  # noqa: A002  the word users see is `id`
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        self.hint = hint
        self.id = id or self.default_id

    def __str__(self) -> str:
        return self.message


class UsageError(FlanctlError):
    """The command line or a setting cannot mean anything."""

    exit_code = 2
    default_id = "usage"


class RegistryUnreachable(FlanctlError):
    """No endpoint answered, or none in a way we understand. Worth trying again."""

    exit_code = 3
    default_id = "registry-unreachable"


class NotFound(FlanctlError):
    """What was asked for does not exist."""

    exit_code = 4
    default_id = "not-found"


class Conflict(FlanctlError):
    """Somebody else's value is where ours should go."""

    exit_code = 5
    default_id = "conflict"


class Invalid(FlanctlError):
    """A config, key, value or file cannot be understood, or breaks a rule."""

    exit_code = 6
    default_id = "invalid"


class NotPermitted(FlanctlError):
    """The kernel, the file system or the registry refused us."""

    exit_code = 7
    default_id = "not-permitted"


class LeaseLost(FlanctlError):
    """Our subnet now belongs to another host. Never a quiet switch: systemd restarts us."""

    exit_code = 8
    default_id = "lease-foreign"


INTERRUPTED = 130
