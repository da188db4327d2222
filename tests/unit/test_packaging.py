"""What the packages carry besides the executable: man pages, completions, sample config, units."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import click
import describe
import pytest

from flanctl.cli import flanctl
from flanctl.settings import PASSWORD, TABLE, resolve
from tests.support.cli import flanctl as run_flanctl

PAGES = describe.man_pages("1.2.3", "2026-01-02")
UNIT = Path("packaging/systemd/flanctl-agent.service")


def _commands(command=flanctl, path="flanctl"):
    yield path, command
    context = click.Context(command)
    for name in command.list_commands(context) if isinstance(command, click.Group) else ():
        child = command.get_command(context, name)
        if not child.hidden:
            yield from _commands(child, f"{path}-{name}")


def test_every_command_has_its_page_and_hidden_ones_have_none():
    assert {name.rpartition(".")[0] for name in PAGES} == {path for path, _ in _commands()}
    assert "flanctl-agent.8" in PAGES
    assert not any("transfer" in name for name in PAGES)


@pytest.mark.needs("mandoc")
@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_page_is_proper_roff(name, tmp_path):
    page = tmp_path / name
    page.write_text(PAGES[name])
    lint = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", page], capture_output=True, text=True, check=False
    )
    assert lint.stdout == ""


@pytest.mark.needs("mandoc")
def test_a_page_shows_every_option_with_its_hyphens_and_every_example():
    for path, command in _commands():
        name = next(name for name in PAGES if name.rpartition(".")[0] == path)
        shown = subprocess.run(
            ["mandoc", "-T", "ascii", "-O", "width=500"],
            input=PAGES[name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        plain = re.sub(".\b", "", shown)
        for parameter in command.params:
            for option in parameter.opts if isinstance(parameter, click.Option) else ():
                assert f"{option}" in plain, f"{option} is not in {name}"
        for line in re.findall(r"^ *(flanctl .*)$", command.help or "", re.MULTILINE):
            assert line.strip() in plain


def test_lines_that_begin_with_roffs_own_characters_are_text():
    assert describe._text(".SH NAME") == "\\&.SH NAME"
    assert describe._text("'quoted") == "\\&'quoted"
    assert describe._text("a\\n -b") == "a\\en \\-b"


def test_the_sample_config_sets_nothing_and_names_every_setting_but_the_password(tmp_path):
    sample = describe.sample_config()
    assert tomllib.loads(sample) == {}
    # `#name = value` is a setting switched off, `# …` is prose.
    switched_on = tmp_path / "flanctl.toml"
    switched_on.write_text("\n".join(re.sub("^#(?! )", "", line) for line in sample.splitlines()))
    settings = resolve({}, environment={}, toml_file=switched_on, sysconfig_files=())
    assert {name for name, value in settings.values.items() if value.source != "default"} == set(TABLE) - {
        PASSWORD.name
    }
    for name, row in TABLE.items():
        if row.default is not None:
            assert settings.text(name).lower() == row.default


@pytest.mark.needs("shells")
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_itself_reads_its_completion(shell, tmp_path):
    script = tmp_path / "completion"
    script.write_text(run_flanctl("completion", shell).out)
    assert "flanctl" in script.read_text()
    check = subprocess.run([shell, "-n", script], capture_output=True, text=True, check=False)
    assert (check.returncode, check.stderr) == (0, "")


@pytest.mark.needs("systemd")
def test_systemd_knows_every_line_of_the_units(tmp_path):
    units = {
        "flanctl-agent.service": UNIT.read_text(),
        "flanneld.service": UNIT.with_name("flanneld.service").read_text(),
        # A drop-in is verified with the service it belongs to.
        "docker.service": Path("packaging/systemd/docker.conf").read_text(),
    }
    for name, text in units.items():
        # Verify also asks whether the programs are there; on this machine they are not.
        (tmp_path / name).write_text(re.sub(r"^(Exec\w+=)/\S+", r"\1/bin/true", text, flags=re.MULTILINE))
    verified = subprocess.run(
        [
            "systemd-analyze",
            "verify",
            "--man=no",
            "--recursive-errors=no",
            *(tmp_path / name for name in units),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (verified.returncode, verified.stderr) == (0, "")


@pytest.mark.needs("systemd")
@pytest.mark.parametrize("unit", [UNIT, UNIT.with_name("flanneld.service")])
def test_the_units_exposure_stays_low(unit):
    # 3.6 with systemd 252; a directive that is lost costs 0.1 or more.
    judged = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=36", unit],
        capture_output=True,
        text=True,
        check=False,
    )
    assert judged.returncode == 0, judged.stdout[-300:]


def test_the_unit_keeps_what_a_restart_needs():
    lines = UNIT.read_text().splitlines()
    # systemd would remove such folders, and subnet.env with them, whenever the agent stops.
    assert not [line for line in lines if line.startswith("RuntimeDirectory=")]
    # systemd 219 reads a list of allowed groups it does not know as "allow nothing".
    assert all(
        line.startswith("SystemCallFilter=~") for line in lines if line.startswith("SystemCallFilter=")
    )
    assert "Type=notify" in lines
    assert "Before=docker.service" in lines


def test_both_units_are_confined_in_the_same_words():
    def service(name):
        lines = UNIT.with_name(name).read_text().partition("[Service]")[2].splitlines()
        own = ("#", "[", "EnvironmentFile=", "ExecStart=", "WantedBy=")
        return {line for line in lines if line and not line.startswith(own)}

    assert service("flanneld.service") - {"ReadWritePaths=/run -/var/log/flannel"} == service(
        "flanctl-agent.service"
    ) - {"ReadWritePaths=/run"}
