"""The real programs' answers, and how a test names each place where we mean to differ."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flanctl.model.dialect import Dialect

VECTORS = Path(__file__).parents[2] / "vectors"

DIALECT_OF = {"v0.7.1": Dialect.V0_7, "v0.20.0": Dialect.V0_28, "v0.28.9": Dialect.V0_28}
"""v0.20.0 and v0.28.9 write the same bytes and check the same rules: one dialect, tried against both."""


def load(name: str) -> Any:
    return json.loads((VECTORS / name).read_text())


@dataclass(frozen=True)
class Difference:
    """We refuse what flannel takes, or say what it panics at. `says` is part of our error, `reason` why."""

    says: str
    reason: str
