"""`flanctl config`: each setting with who said so; `flanctl config check`: what is wrong in the places they come from."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from flanctl.commands import output
from flanctl.commands.groups import SETTINGS, LazyGroup
from flanctl.commands.options import agent_options, output_options, registry_options, settings, write_out
from flanctl.settings import SYSCONFIG_FILES, TABLE, TOML_FILE

if TYPE_CHECKING:
    from flanctl.commands.config_check import Finding
    from flanctl.settings import Settings


def show(chosen: Settings, form: str) -> None:
    """Every setting of the table: name, value, source; a secret's value is hidden in every form."""
    rows = [
        (name, chosen.shown(name), chosen.source(name) if name in chosen.values else None) for name in TABLE
    ]
    if form == "json":
        output.json({"settings": [_document(chosen, name) for name in TABLE]})
    elif form == "simple":
        output.simple(rows)
    else:
        output.table(("SETTING", "VALUE", "SOURCE"), rows)


def _document(chosen: Settings, name: str) -> dict[str, object]:
    row, value = TABLE[name], chosen.values.get(name)
    shown: object = chosen.shown(name)
    if row.repeatable:
        shown = list(chosen.items(name))
    return {
        "name": name,
        "value": shown,
        "secret": row.secret,
        "source": None if value is None else value.source,
        "from": None if value is None else value.name,
        "file": None if value is None else value.file,
        "line": None if value is None or value.file is None else value.line,
    }


@click.command(
    cls=LazyGroup,
    lazy={"check": "flanctl.commands.config:check"},
    context_settings=SETTINGS,
    invoke_without_command=True,
)
@registry_options
@agent_options
@output_options
@click.pass_context
def config(context: click.Context) -> None:
    """Show each setting, its value, and who said so; or check the files they come from.

    The order is: flag, FLANCTL_ variable, FLANNELD_, FLANNEL_, ETCDCTL_, /etc/flanctl/flanctl.toml,
    /etc/sysconfig/flanneld, /etc/default/flanneld, default. A source reads `FLANNEL_OPTIONS in
    /etc/sysconfig/flanneld:8`. Passwords are never shown. All settings: docs/reference/settings.md.

    \b
    Examples:
      flanctl config
      flanctl config -w simple | grep ^prefix
      flanctl config check
    """
    if context.invoked_subcommand is None:
        show(settings(), write_out())


@click.command()
@click.argument("files", nargs=-1, metavar="[FILE]...", type=click.Path())
@click.option("--strict", is_flag=True, help="End with 1 for warnings too.")
@output_options
def check(files: tuple[str, ...], strict: bool) -> None:
    """Find what is wrong in the files and variables that settings come from.

    Unknown names, flags without effect, quoting mistakes, contradictions, values that mean nothing, secrets that
    everyone may read. Each is named with file and line, its cause and the next step; nothing is changed. Without FILE:
    /etc/flanctl/flanctl.toml, /etc/sysconfig/flanneld, /etc/default/flanneld as far as they exist, and the
    environment. A FILE that ends in .toml is flanctl's, any other is read as systemd reads an EnvironmentFile.

    \b
    Examples:
      flanctl config check
      flanctl config check /srv/new/flanneld -w json

    \b
    Exit codes: 0 nothing failed, 1 something did (--strict: or a warning), 4 no such FILE,
    7 not permitted.
    """
    from flanctl.commands.config_check import FAIL, check_environment, check_file, check_together
    from flanctl.errors import UsageError
    from flanctl.settings import resolve

    places = list(files) or [path for path in (TOML_FILE, *SYSCONFIG_FILES) if os.path.exists(path)]
    found = [finding for path in places for finding in check_file(path)]
    if not files:
        found += check_environment(os.environ)
        try:
            found += check_together(resolve({}))
        except UsageError:
            pass  # a file that cannot be understood: that is said already
        places.append("environment")
    elif len(files) == 1:
        found += _together(files[0])
    _print(places, found, write_out())
    failed = [finding for finding in found if finding.severity == FAIL or strict]
    click.get_current_context().exit(1 if failed else 0)


def _together(path: str) -> list[Finding]:
    """What contradicts itself inside of one file."""
    from flanctl.commands.config_check import check_together
    from flanctl.errors import UsageError
    from flanctl.settings import resolve

    is_toml = path.endswith(".toml")
    try:
        alone = resolve(
            {},
            environment={},
            toml_file=path if is_toml else os.devnull,
            sysconfig_files=() if is_toml else (path,),
        )
    except UsageError:
        return []
    return check_together(alone)


def _print(places: list[str], found: list[Finding], form: str) -> None:
    if form == "json":
        findings = [
            {
                "severity": each.severity,
                "id": each.id,
                "file": each.file,
                "line": each.line or None,
                "says": each.says,
                "next": each.next,
            }
            for each in found
        ]
        output.json({"checked": places, "findings": findings})
    elif form == "simple":
        output.simple(
            [(each.severity, each.id, each.file, each.line or None, each.says, each.next) for each in found]
        )
    else:
        for each in found:
            output.line(f"{each.severity}  {each.where}: {each.says}   [{each.id}]")
            output.line(f"      next: {each.next}")
        bad = {each.file for each in found}
        for place in places:
            if place not in bad:
                output.line(f"ok    {place}")
        failed = sum(each.severity == "fail" for each in found)
        output.note(f"{failed} failed, {len(found) - failed} warnings")
