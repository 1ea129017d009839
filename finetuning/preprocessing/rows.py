"""The rows of data files, checked. How a file is read is in files.py, what a row may be in schema.py."""

from collections import Counter
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


def load_rows(path: str, output_required: bool = True, rename: dict[str, str] | None = None) -> Rows:
    """Read and check every row of one or more data files.

    Args:
        path: a file, a folder, a pattern, or several with commas between: see `files.find_files`.
        output_required: whether each row must hold an answer: yes for training, no for inference.
        rename: for each field of the files that has another name here, that name: see `schema.rename_fields`.

    Returns:
        The rows, in the form of `schema.read_row`. The names of fields that mean nothing here are printed.

    Raises:
        SystemExit: code 2, with a line that names the file, the row (counted from 1), the field and the remedy.
    """
    files, rename, seen = find_files(path), rename or {}, set()
    rows = Rows(path, hash_files(files))
    if len(files) > 1:
        say(f"{path}: {len(files)} files, from {files[0]} to {files[-1]}")
    for file in files:
        for place, row in read_file(file):
            seen |= rename.keys() & (row if isinstance(row, dict) else {})
            try:
                rows.append(read_row(rename_fields(row, rename), output_required))
            except RowError as error:
                fail(f"{file}: {place}: {error}")
    for old in rename.keys() - seen:
        fail(f"{path}: no row has the field '{old}', which --{rename[old]}_field names")
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
