"""Every architecture with every method: trained, resumed, asked, asked for labels, and merged, by the real commands.

`python tests/matrix.py` prints the outcomes as a table. An action that is refused has its line of error there; none is.
"""

from pathlib import Path

import pytest
from matrix import KINDS, METHODS, make_table, try_cell


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_cell(kind: str, method: str, tmp_path: Path) -> None:
    outcomes = try_cell(kind, method, tmp_path)
    assert set(outcomes.values()) == {"yes"}, make_table({(kind, method): outcomes})
