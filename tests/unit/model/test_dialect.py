from __future__ import annotations

import pytest

from flanctl.errors import Invalid
from flanctl.model.dialect import Dialect


@pytest.mark.parametrize("dialect", Dialect)
def test_a_dialect_is_read_as_it_prints(dialect: Dialect) -> None:
    assert Dialect.parse(str(dialect)) is dialect


def test_an_unknown_dialect_is_refused_with_the_known_ones() -> None:
    with pytest.raises(Invalid) as caught:
        Dialect.parse("0.9")
    assert caught.value.hint == "one of 0.7, 0.28"


@pytest.mark.parametrize(
    ("prefix", "in_0_7", "in_0_28"),
    [(8, 24, 24), (22, 24, 24), (23, 24, 25), (24, 25, 26), (28, 29, 30)],
)
def test_the_default_subnet_length_depends_on_the_dialect(prefix: int, in_0_7: int, in_0_28: int) -> None:
    assert Dialect.V0_7.default_subnet_len(prefix) == in_0_7
    assert Dialect.V0_28.default_subnet_len(prefix) == in_0_28
