"""What the packages say about the command line, made from the command line itself: man pages, sample config.

roff's own characters (a backslash, a hyphen, a dot or quote that begins a line) are escaped in one place, `_text`.
click-man was looked at: it leaves \\b blocks, leading dots and lazily imported commands as they are.
"""

from __future__ import annotations

import re
from inspect import cleandoc
from typing import TYPE_CHECKING

import click

from flanctl.cli import flanctl
from flanctl.settings import AGENT, REGISTRY, SYSCONFIG_FILES, TOML_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanctl.settings import Setting

_SECTION = {"flanctl agent": 8}
"""The daemon is a system program; everything else is section 1."""


def man_pages(version: str, date: str) -> dict[str, str]:
    """Every shown command's page by file name (`flanctl-subnets-ls.1`). `date` is YYYY-MM-DD."""
    contexts = list(_tree(flanctl, None, "flanctl"))
    names = [context.command_path for context in contexts]
    return {
        f"{path.replace(' ', '-')}.{_section(path)}": _page(context, names, version, date)
        for context, path in zip(contexts, names, strict=True)
    }


def sample_config() -> str:
    """flanctl.toml with every setting, all of them comments: installing it changes nothing."""
    lines = [
        "# flanctl's settings. Flags and FLANCTL_* variables beat this file; it beats /etc/sysconfig/flanneld.",
        "# Everyone may read it: a password belongs into a file of its own, named by password-file.",
    ]
    for row in (*REGISTRY, *AGENT):
        lines += ["", f"# {row.help}", f"#{row.name.replace('_', '-')} = {_example(row)}"]
    return "\n".join(lines) + "\n"


def _example(row: Setting) -> str:
    value = row.default if row.default is not None else row.choices[0] if row.choices else row.metavar or ""
    if row.kind in {"switch", "number"}:
        return value
    return f'["{value}"]' if row.repeatable else f'"{value}"'


def _tree(command: click.Command, parent: click.Context | None, name: str) -> Iterator[click.Context]:
    context = click.Context(command, parent=parent, info_name=name, **command.context_settings)
    yield context
    if isinstance(command, click.Group):
        for child in sorted(command.list_commands(context)):
            found = command.get_command(context, child)
            if found is not None and not found.hidden:
                yield from _tree(found, context, child)


def _section(path: str) -> int:
    return _SECTION.get(path, 1)


def _page(context: click.Context, names: list[str], version: str, date: str) -> str:
    command, path = context.command, context.command_path
    about, examples = _paragraphs(command.help or "")
    title = path.replace(" ", "-")
    short = re.sub(r"\.$", "", " ".join(about[0].split()).split(". ")[0]) if about else ""
    out = [f'.TH "{title.upper()}" "{_section(path)}" "{date}" "flanctl {version}" "flanctl"']
    out += [".SH NAME", f"{_text(title)} \\- {_text(short)}"]
    usage = " ".join(command.collect_usage_pieces(context))
    out += [".SH SYNOPSIS", f"\\fB{_text(path)}\\fR {_text(usage)}"]
    out.append(".SH DESCRIPTION")
    for number, paragraph in enumerate(about):
        out += [".PP"] * (number > 0)
        if paragraph.startswith("\b"):
            out += [".nf", *map(_text, paragraph.splitlines()[1:]), ".fi"]
        else:
            out += map(_text, paragraph.splitlines())
    children = [name for name in names if name.rpartition(" ")[0] == path]
    if children:
        out.append(".SH COMMANDS")
        for child in children:
            out += [".TP", _reference(child)]
            found = command.get_command(context, child.rpartition(" ")[2])  # type: ignore[attr-defined]
            out.append(_text(found.get_short_help_str(200)))
    options = [record for parameter in command.params if (record := parameter.get_help_record(context))]
    if options:
        out.append(".SH OPTIONS")
        for names_of, text in options:
            bold = re.sub(r"(?<!\S)(\\-[^\s,]+)", r"\\fB\1\\fR", _text(names_of))
            out += [".TP", bold, _text(text)]
    for heading, lines in examples:
        out += [f".SH {heading}", ".nf", *map(_text, lines), ".fi"]
    if path == "flanctl":
        out.append(".SH FILES")
        for file, text in (
            (TOML_FILE, "settings of flanctl"),
            *((file, "settings of flanneld, read as they are") for file in SYSCONFIG_FILES),
        ):
            out += [".TP", f"\\fI{_text(str(file))}\\fR", _text(text)]
    related = [name for name in ("flanctl", path.rpartition(" ")[0]) if name and name != path]
    if related:
        out += [".SH SEE ALSO", ",\n".join(_reference(name) for name in dict.fromkeys(related))]
    return "\n".join(out) + "\n"


def _paragraphs(text: str) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """A help text's paragraphs, and apart from them its literal blocks that are sections of a man page."""
    about: list[str] = []
    sections: list[tuple[str, list[str]]] = []
    for paragraph in re.split(r"\n\s*\n", cleandoc(text).partition("\f")[0]):
        first, *rest = paragraph.split("\n")[1:] if paragraph.startswith("\b") else [""]
        if first in {"Example:", "Examples:"}:
            sections.append(("EXAMPLES", [line.removeprefix("  ") for line in rest]))
        elif first.startswith("Exit codes: "):
            sections.append(("EXIT STATUS", [first.removeprefix("Exit codes: "), *rest]))
        elif paragraph.strip():
            about.append(paragraph)
    return about, sections


def _reference(path: str) -> str:
    return f"\\fB{_text(path.replace(' ', '-'))}\\fR({_section(path)})"


def _text(line: str) -> str:
    escaped = line.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped
