"""The rows of data files, checked. How a file is read is in files.py, what a row may be in schema.py."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from finetuning.cli.console import fail, say
from finetuning.preprocessing.files import find_files, hash_files, read_file
from finetuning.preprocessing.schema import FIELDS, RowError, read_row, rename_fields

NO_TASK = "rows"


class Rows(list[dict[str, Any]]):
    """Rows in the order of their files, with the `path` that the user gave and the files' SHA-256 (`hash_files`)."""

    def __init__(self, path: str, sha256: str) -> None:
        super().__init__()
        self.path = path
        self.sha256 = sha256


def load_rows(
    path: str, output_required: bool = True, rename: dict[str, str] | None = None, numbers: set[int] | None = None
) -> Rows:
    """Read and check rows of one or more data files.

    Args:
        path: a file, a folder, a pattern, or several with commas between: see `files.find_files`.
        output_required: whether each row must hold an answer: yes for training, no for inference.
        rename: for each field of the files that has another name here, that name: see `schema.rename_fields`.
        numbers: of the rows to read, counted from 1 over all files; None for all rows.

    Returns:
        The rows, in the form of `schema.read_row`.

    Raises:
        SystemExit: code 2, with a line that names the file, the row (counted from 1), the field and the remedy.
    """
    files, rename = find_files(path), rename or {}
    rows, seen = Rows(path, hash_files(files)), Counter()
    for number, (place, row) in enumerate(read_files(files), 1):
        if numbers is not None and number not in numbers:
            continue
        try:
            rows.append(read_row(rename_fields(row, rename), output_required))
        except RowError as error:
            fail(f"{place}: {error}")
        seen.update(rename.keys() & row.keys())
    check_renamed(path, rename, seen)
    return rows


def read_files(files: list[str]) -> Iterator[tuple[str, Any]]:
    """Each row of the files, as it stands there, and its place: the file, and the row or the line."""
    for file in files:
        for place, row in read_file(file):
            yield f"{file}: {place}", row


def check_renamed(path: str, rename: dict[str, str], seen: Counter[str]) -> None:
    """Refuse a flag that names a field which no row has: an input that is misspelt would be missing everywhere."""
    for name in rename:
        if not seen[name]:
            fail(f"{path}: no row has the field '{name}', which --{rename[name]}_field names")


def count_unread(rows: Iterable[dict[str, Any]]) -> Counter[str]:
    """How many rows have each of the fields that mean nothing here."""
    return Counter(name for row in rows for name, value in row.items() if name not in FIELDS and value is not None)


def print_unread(path: str, counts: Counter[str]) -> None:
    if counts:
        say(f"{path}: not read: {', '.join(f'{name} ({count:,} rows)' for name, count in counts.items())}")


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
