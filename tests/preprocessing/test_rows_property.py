"""rows.py on generated data files: what they hold is read exactly, or refused in words that name the file."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import damaged, read_all, read_or_refuse

from finetuning.preprocessing.files import DataError
from finetuning.preprocessing.rows import normalize_row

# Characters that have broken readers before: line separators, quotes, brackets, a byte-order mark, wide characters.
TEXT = st.text(
    st.sampled_from('ab 1"\\[]{},:\n\r\t\u2028\x85\x1e\ufeff你好é🙂\x00') | st.characters(codec="utf-8"), max_size=8
)
VALUE = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.lists(TEXT, max_size=2)
FILLED = TEXT.map(lambda text: "x" + text)
GOOD_ROW = st.fixed_dictionaries(
    {"instruction": FILLED, "output": TEXT}, optional={"input": st.none() | TEXT, "task": VALUE, "other": VALUE}
) | st.fixed_dictionaries(
    {
        "messages": st.lists(st.tuples(FILLED, TEXT), min_size=1, max_size=2).map(
            lambda turns: [
                {"role": role, "content": content}
                for turn in turns
                for role, content in zip(("user", "assistant"), turn, strict=True)
            ]
        )
    }
)
ANY_ROW = GOOD_ROW | st.dictionaries(st.sampled_from(["instruction", "input", "output", "messages"]), VALUE) | VALUE


def as_list(rows: list[Any]) -> str:
    return json.dumps(rows, ensure_ascii=False, indent=1)


def as_lines(rows: list[Any]) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


FORMAT = st.sampled_from([as_list, as_lines, lambda rows: as_lines(rows).replace("\n", "\r\n\r\n") + "\n"])
ENCODING = st.sampled_from(["utf-8", "utf-8-sig"])
WRONG_ENCODING = st.sampled_from(["utf-16", "utf-16-le", "utf-32", "gb18030"])


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], list[dict[str, Any]] | None]:
    """Read a file of these bytes; None if it is refused."""
    path = tmp_path_factory.mktemp("property") / "rows.json"

    def read(data: bytes) -> list[dict[str, Any]] | None:
        path.write_bytes(data)
        return read_or_refuse(read_all, path)

    return read


TEXTS = ("instruction", "input", "output", "other")


def expected(rows: list[Any]) -> list[Any]:
    """Null is absent, and so is a conversation or a task that is empty."""
    rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
    rows = [{name: value for name, value in row.items() if value != "" or name in TEXTS} for row in rows]
    return [row if "messages" in row else {"input": ""} | row for row in rows]


def is_good(row: Any) -> bool:
    try:
        return bool(normalize_row(row, {}, output_required=True))
    except DataError:
        return False


def same(first: Any, second: Any) -> bool:
    """Equal as JSON, with NaN equal to NaN."""
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


@given(rows=st.lists(GOOD_ROW, min_size=1, max_size=4), form=FORMAT, encoding=ENCODING)
def test_good_files_are_read_exactly(read: Callable, rows: list[Any], form: Callable, encoding: str) -> None:
    found = read(form(rows).encode(encoding))
    assert found is not None and same(found, expected(rows))


@given(rows=st.lists(ANY_ROW, max_size=4), form=FORMAT, encoding=ENCODING | WRONG_ENCODING)
def test_odd_rows_and_encodings(read: Callable, rows: list[Any], form: Callable, encoding: str) -> None:
    """All rows of a file or none: if one of them is not a row, the file is refused."""
    found = read(form(rows).encode(encoding))
    good = bool(rows) and all(is_good(row) for row in rows)
    if found is not None:
        assert same(found, expected(rows))  # whatever the encoding: never other text, never another count
    elif good:
        assert encoding not in ("utf-8", "utf-8-sig")


@given(
    rows=st.lists(GOOD_ROW, min_size=1, max_size=3),
    form=FORMAT,
    place=st.floats(0, 1, exclude_max=True),
    damage=st.sampled_from(["cut", "remove", "double", "flip", "insert", "append"]),
    junk=st.sampled_from(
        [b"}", b"{}", b"[", b"]", b",", b"\n", b"\xff", b"\x00", b'"', b"//", b"NaN", b"[" * 5000, b"9" * 5000]
    ),
)
def test_damaged_files(read: Callable, rows: list[Any], form: Callable, place: float, damage: str, junk: bytes) -> None:
    """Against Python's own JSON reader: what it finds in the damaged file is read, or the file is refused."""
    data = damaged(form(rows).encode(), damage, place, junk)
    found = read(data)
    if found is None:
        return
    text = data.decode("utf-8-sig")
    try:
        whole = json.loads(text)
        held = whole if isinstance(whole, list) else [whole]
    except ValueError:
        held = [json.loads(line) for line in text.split("\n") if line.strip()]
    assert same(found, expected(held))
