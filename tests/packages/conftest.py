from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import packages
import pytest

from tests.support.capabilities import frozen_executable, missing

if TYPE_CHECKING:
    from pathlib import Path

NEEDS = ("frozen", "debian-tree", "go")
EPOCH = 1_700_000_000


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A folder in which `make packages` ran once on the frozen executable."""
    for name in NEEDS:
        assert missing(name) is None, f"mark the test with needs({name!r})"
    folder = tmp_path_factory.mktemp("dist")
    (folder / "flanctl").symlink_to(frozen_executable())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", str(EPOCH))
        assert packages.main(folder) == 0
    return folder


@pytest.fixture(scope="session")
def newer(tmp_path_factory):
    """`newer("deb")`: the package of a higher release, whose sample config is another one."""
    folder = tmp_path_factory.mktemp("newer")
    packages.fill_stage(folder / "stage", EPOCH)
    with (folder / "stage" / "flanctl.toml").open("a") as sample:
        sample.write("\n# news of the newer version\n")

    @functools.cache
    def build(kind: str) -> Path:
        target = folder / f"newer.{kind}"
        packages.package(
            kind,
            target,
            executable=frozen_executable(),
            stage=folder / "stage",
            epoch=EPOCH,
            release="2",
        )
        return target

    return build
