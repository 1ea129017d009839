"""files.py on damaged or odd files: the right rows, or a line that names the file; never a traceback or wrong rows.

What is right is what json, csv and pyarrow make of the same bytes when they have all of them at once.
"""

import bz2
import csv
import gzip
import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pyarrow import parquet
from support import damaged, read_or_refuse
from test_files import FORMS, compress

from finetuning.cli.console import fail
from finetuning.preprocessing import files, readers
from finetuning.preprocessing.files import DataError
from finetuning.preprocessing.readers import read_file

TEXT = st.text(st.sampled_from("ab1\"'\\[]{},;:\n\r\t\u2028\x85\ufeff你é🙂") | st.characters(codec="utf-8"), max_size=8)
ROWS = st.lists(st.fixed_dictionaries({"instruction": TEXT, "output": TEXT}), min_size=1, max_size=5)
JUNK = [
    b'"',
    b",",
    b"\n",
    b"\r",
    b"\t",
    b"{",
    b"}",
    b"[",
    b"]",
    b"{}",
    b"\xff",
    b"\x00",
    b"\xef\xbb\xbf",
    b"PAR1",
    b"1e",
]
DAMAGE = st.sampled_from(["none", "cut", "remove", "double", "flip", "insert", "append", "swap"])


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bytes, int], list[Any] | None]:
    """Read the rows of a file with this name and these bytes; None if it is refused."""
    folder = tmp_path_factory.mktemp("files")

    def read(name: str, data: bytes, chunk: int) -> list[Any] | None:
        path = folder / name
        path.write_bytes(data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(readers, "CHUNK", chunk)
            patch.setattr(files, "SNIFF", 8)
            return read_or_refuse(read_raw, path)

    return read


def read_raw(path: str) -> list[Any]:
    try:
        rows = [row for _, row in read_file(path, ())]
    except DataError as error:
        fail(f"{path}: {error}")
    return rows or fail(f"{path}: holds no rows")


def decompressed(data: bytes) -> bytes:
    """With the whole archive in memory, and Python's or Arrow's own checks."""
    if data.startswith(b"\x1f\x8b"):
        return gzip.decompress(data)
    if data.startswith(b"BZh"):
        return bz2.decompress(data)
    if data.startswith(b"(\xb5/\xfd"):
        return pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read()
    return data


def whole_json(text: str) -> list[Any]:
    if text.lstrip()[0] == "[":
        return json.loads(text)
    try:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError:
        return [json.loads(text)]


def whole_table(text: str, delimiter: str) -> list[Any]:
    lines = [
        cells for cells in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if any(cells)
    ]
    header, *rows = lines
    header = [name or f"column {number}" for number, name in enumerate(header, 1)]
    assert rows and len(set(header)) == len(header)
    return [dict(zip(header, cells, strict=True)) for cells in rows]


def whole_file(name: str, data: bytes) -> list[Any]:
    """What the file holds, read at once; raises if it holds nothing that can be read."""
    data = decompressed(data)
    if data.startswith(b"PAR1"):
        return parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    text = data.decode("utf-8-sig")
    is_table = name.split(".")[1] in ("csv", "tsv") and text.lstrip()[0] not in "[{"
    return whole_table(text, "\t" if ".tsv" in name else ",") if is_table else whole_json(text)


def is_good(name: str, data: bytes) -> bool:
    """Whether a file that is as it was written can be read."""
    try:
        return "\0" not in str(whole_file(name, data)) and bool(whole_file(name, data))
    except (ValueError, AssertionError, csv.Error):
        return False


def same(first: Any, second: Any) -> bool:
    """Equal as JSON, with NaN equal to NaN."""
    return json.dumps(first, sort_keys=True, default=str) == json.dumps(second, sort_keys=True, default=str)


@given(
    rows=ROWS,
    form=st.sampled_from(list(FORMS)),
    ending=st.sampled_from([None, *FORMS, "txt"]),
    damage=DAMAGE,
    place=st.floats(0, 1, exclude_max=True),
    junk=st.sampled_from(JUNK),
    chunk=st.sampled_from([1, 3, 16, 100, 1 << 20]),
)
@example([{"instruction": "a", "output": "b"}], "json", None, "append", 0.0, b" ]", 1)
@example([{"instruction": "a", "output": "1e5"}], "csv", "json", "none", 0.0, b"", 1)
def test_damaged_files(
    read: Callable, rows: list[Any], form: str, ending: str | None, damage: str, place: float, junk: bytes, chunk: int
) -> None:
    data = damaged(FORMS[form](rows), damage, place, junk)
    name = f"rows.{ending or form}"
    found = read(name, data, chunk)
    if found is None:
        assert damage != "none" or ending is not None or not is_good(name, data), rows
        return
    # The first bytes of a file may be damaged so that it is another: what counts is that this one is read exactly.
    assert same(found, whole_file(name, data))


@given(
    rows=ROWS,
    form=st.sampled_from(["json", "jsonl", "csv", "tsv"]),
    encodings=st.lists(
        st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "gb18030", "utf-32-le"]), min_size=1, max_size=3
    ),
    compression=st.sampled_from(["", "gz", "zst", "bz2"]),
    chunk=st.sampled_from([1, 3, 1 << 20]),
)
def test_mixed_encodings(
    read: Callable, rows: list[Any], form: str, encodings: list[str], compression: str, chunk: int
) -> None:
    """Parts of a file in different encodings, as after `cat a.csv b.csv > c.csv`."""
    text = FORMS[form](rows).decode()
    size = -(-len(text) // len(encodings))
    parts = [text[number * size :][:size].encode(encoding) for number, encoding in enumerate(encodings)]
    data = b"".join(parts)
    name = f"rows.{form}" + (f".{compression}" if compression else "")
    found = read(name, compress(data, compression) if compression else data, chunk)
    if found is not None:
        assert same(found, whole_file(name, data))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.json.gz", "a.csv.zst", "a"])
def test_empty_files(read: Callable, name: str) -> None:
    for data in (
        b"",
        b"\n \n",
        b"\xef\xbb\xbf",
        b"[",
        b"[]",
        b"[[[[]]]]"[:7],
        gzip.compress(b""),
        compress(b"", "zst"),
    ):
        assert read(name, data, 1) is None


def test_every_cut_of_an_archive(read: Callable) -> None:
    """A download that broke off is never read as if it were whole."""
    rows = [{"instruction": f"{number} 你好", "output": "b" * number} for number in range(20)]
    for form, write in FORMS.items():
        data = write(rows)
        assert read(f"rows.{form}", data, 100) == rows
        for end in range(0, len(data), 7):
            found = read(f"rows.{form}", data[:end], 100)
            if form.split(".")[-1] in ("gz", "zst", "parquet", "json"):
                assert found is None, (form, end)


def test_flipped_bits_of_an_archive(read: Callable) -> None:
    """What has a checksum is read as it was, or refused."""
    rows = [{"instruction": f"{number} 你好", "output": "b" * number} for number in range(20)]
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink, write_page_checksum=True)
    table = sink.getvalue().to_pybytes()
    footer = 8 + int.from_bytes(table[-8:-4], "little")  # has no checksum
    for form, data, end in (
        ("json.gz", FORMS["json.gz"](rows), 0),
        ("csv.gz", FORMS["csv.gz"](rows), 0),
        ("parquet", table, footer),
    ):
        for at in range(10, len(data) - end, 5):
            found = read(f"rows.{form}", data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :], 50)
            assert found in (None, rows), (form, at)
