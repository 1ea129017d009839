"""The rows of a data file: a JSON list or JSON Lines, read strictly: a file is either understood or refused.

What a row may be is in schema.py. The JSON reader of `datasets` is not used because it guesses: it turns strings that
look like dates into dates and a columnar file into one row, and its Arrow errors do not name the row.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from finetuning.cli.console import fail, say
from finetuning.preprocessing.schema import EXAMPLE, FIELDS, RowError, read_row

NO_TASK = "rows"

# Other formats, by their first bytes or their ending, and how to make JSON Lines of them.
PANDAS = "python -c \"import pandas; pandas.read_{0}('{1}').to_json('rows.jsonl', orient='records', lines=True)\""
MAGIC = {b"PAR1": "parquet", b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"(\xb5/\xfd": "zstd"}
UNPACK = {"gzip": "gunzip -k {0}", "zip": "unzip {0}", "zstd": "zstd -d {0}"}


class Rows(list[dict[str, Any]]):
    """The rows of a data file in the file's order, with its `path` and the SHA-256 of its bytes."""

    def __init__(self, path: str, sha256: str) -> None:
        super().__init__()
        self.path = path
        self.sha256 = sha256


def load_rows(path: str, output_required: bool = True) -> Rows:
    """Read and check every row of a data file.

    Args:
        path: a JSON file that holds a list of rows, or a JSON Lines file with one row a line; UTF-8, with or without
            a byte-order mark.
        output_required: whether each row must hold an answer: yes for training, no for inference.

    Returns:
        The rows, in the form of `schema.read_row`. The names of fields that mean nothing here are printed.

    Raises:
        SystemExit: code 2, with a line that names the file, the row (counted from 1), the field and the remedy.
    """
    data = read_bytes(path)
    rows = Rows(path, hashlib.sha256(data).hexdigest())
    refuse_other_formats(path, data)
    for place, row in parse(path, decode(path, data)):
        try:
            rows.append(read_row(row, output_required))
        except RowError as error:
            fail(f"{path}: {place}: {error}")
    unread = Counter(name for row in rows for name, value in row.items() if name not in FIELDS and value is not None)
    if unread:
        say(f"{path}: not read: {', '.join(f'{name} ({count:,} rows)' for name, count in unread.items())}")
    return rows


def question(row: dict[str, Any]) -> dict[str, Any]:
    """A row without its answer, if it has one."""
    if expected_answer(row) is None:
        return row
    if "messages" in row:
        return row | {"messages": row["messages"][:-1]}
    return {name: value for name, value in row.items() if name not in ("output", "reasoning_content")}


def expected_answer(row: dict[str, Any]) -> str | None:
    """The answer in a row: its output, or its last message if that is the assistant's; None without an answer."""
    if "messages" in row:
        return row["messages"][-1]["content"] if row["messages"][-1]["role"] == "assistant" else None
    return row.get("output")


def by_task(rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    """The numbers of the rows of each `task`, in order of appearance; rows without one are under NO_TASK."""
    tasks: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        tasks.setdefault(str(row.get("task", NO_TASK)), []).append(number)
    return tasks


def read_bytes(path: str) -> bytes:
    file = Path(path)
    if not file.exists():
        hint = "; name one file, not a pattern" if set(path) & set("*?[") else ""
        fail(f"data file '{path}' does not exist{hint}")
    if not file.is_file():
        fail(f"'{path}' is not a file; name one JSON or JSON Lines file")
    try:
        return file.read_bytes()
    except OSError as error:
        fail(f"{path}: cannot be read: {error.strerror}")


def refuse_other_formats(path: str, data: bytes) -> None:
    """Name a file that is not JSON by its format, with the command that makes JSON Lines of it."""
    ending = Path(path).suffix.lower().removeprefix(".")
    kind = next((kind for magic, kind in MAGIC.items() if data.startswith(magic)), ending)
    kind = "excel" if ending == "xlsx" else kind
    if kind in UNPACK:
        fail(f"{path}: is a {kind} file; unpack it first: {UNPACK[kind].format(path)}")
    if kind in ("parquet", "excel", "csv", "tsv"):
        reader = "table" if kind == "tsv" else kind
        name = "an Excel" if kind == "excel" else f"a {kind}"
        fail(f"{path}: is {name} file, not JSON; convert it: {PANDAS.format(reader, path)}")


def decode(path: str, data: bytes) -> str:
    remedy = "save it as UTF-8, for example: iconv -f {0} -t UTF-8 old.json > new.json"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in data[:1024]:
        fail(f"{path}: is UTF-16 or UTF-32 text, not UTF-8; {remedy.format('UTF-16')}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fail(f"{path}: byte {error.start} is not UTF-8 (GBK, perhaps?); {remedy.format('GB18030')}")
    if not text.strip():
        fail(f"{path}: is empty; it should hold a list of rows like {EXAMPLE}")
    return text


def parse(path: str, text: str) -> list[tuple[str, Any]]:
    """Split a file's text into rows, each with its place as error messages name it: "row 3" or "line 3"."""
    if text.lstrip()[0] == "[":
        rows = parse_json(path, text)
        if not rows:
            fail(f"{path}: holds an empty list; it should hold rows like {EXAMPLE}")
        return [(f"row {number}", row) for number, row in enumerate(rows, 1)]
    # JSON Lines. str.splitlines would also split at U+2028, for example, which JSON allows inside a string.
    lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        return [(place, json.loads(line)) for place, line in lines]
    except (ValueError, RecursionError):
        pass
    try:
        whole = json.loads(text)  # one object over several lines?
    except (ValueError, RecursionError):
        for place, line in lines:
            parse_json(f"{path}: {place}", line)  # name the first line that is broken
    return [("the file", whole)]


def parse_json(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        fail(f"{place}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested brackets
        fail(f"{place}: not valid JSON: {error}")
