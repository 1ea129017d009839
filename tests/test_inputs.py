"""The table of inputs, INPUTS.md: each is run through the real command, and shows the line that the table has."""

import inputs
import pytest


@pytest.mark.slow
def test_table() -> None:
    assert inputs.make_table() == inputs.TABLE.read_text(encoding="utf-8")
