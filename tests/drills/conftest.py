"""The field each drill gets."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from tests.drills.field import Field

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def field(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Field]:
    """Not started yet; whatever the drill starts is gone afterwards."""

    def say(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}")

    with closing(Field(request.param, tmp_path, say)) as field:
        yield field
