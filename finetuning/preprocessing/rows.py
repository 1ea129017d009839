"""The rows of a data file: a JSON list or JSON Lines, read strictly: a file is either understood or refused.

A row is {"instruction": str, "input": str, "output": str} or {"messages": [{"role": ..., "content": str}, ...]}.
Other fields are kept as they are. The JSON reader of `datasets` is not used because it guesses: it turns strings that
look like dates into dates and a columnar file into one row, and its Arrow errors do not name the row.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from finetuning.cli.console import fail

NO_TASK = "rows"
ROLES = ("system", "user", "assistant")
EXAMPLE = '{"instruction": "翻译为英文", "input": "你好", "output": "Hello"}'


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
        The rows. `input` is always a str ("" if it was absent or null).

    Raises:
        SystemExit: code 2, with a line that names the file, the row (counted from 1), the field and the remedy.
    """
    data = read_bytes(path)
    rows = Rows(path, hashlib.sha256(data).hexdigest())
    for place, row in parse(path, decode(path, data)):
        problem = check_row(row, output_required)
        if problem:
            fail(f"{path}: {place}: {problem}")
        if "messages" not in row:
            row["input"] = row.get("input") or ""
        rows.append(row)
    return rows


def question(row: dict[str, Any]) -> dict[str, Any]:
    """A row without its answer, if it has one."""
    if expected_answer(row) is None:
        return row
    if "messages" in row:
        return row | {"messages": row["messages"][:-1]}
    return {name: value for name, value in row.items() if name != "output"}


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
        fail(f"data file '{path}' does not exist")
    if not file.is_file():
        fail(f"'{path}' is not a file; name one JSON or JSON Lines file")
    try:
        return file.read_bytes()
    except OSError as error:
        fail(f"{path}: cannot be read: {error.strerror}")


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


def check_row(row: Any, output_required: bool) -> str | None:
    """What is wrong with a row, or None."""
    if not isinstance(row, dict):
        return f"is {describe(row)}, not an object like {EXAMPLE}"
    if "messages" in row:
        return check_messages(row["messages"], output_required)
    if "instruction" not in row:
        columnar = any(isinstance(value, list | dict) for value in row.values())
        hint = "rows must be a plain list, not nested or in columns" if columnar else f"a row is {EXAMPLE}"
        return f"has no 'instruction' (its fields: {', '.join(map(repr, row)) or 'none'}); {hint}"
    if output_required and "output" not in row:
        return f"has no 'output' (its fields: {', '.join(map(repr, row))}); training needs the answer"
    for field in ("instruction", "input", "output"):
        if field not in row or (field == "input" and row[field] is None):
            continue
        problem = check_text(row[field])
        if problem:
            return f"'{field}' {problem}"
    if not row["instruction"].strip():
        return "'instruction' is empty; write what the model should do"
    return None


def check_messages(messages: Any, output_required: bool) -> str | None:
    if not isinstance(messages, list) or not messages:
        return f"'messages' is {describe(messages)}, not a list of {{'role': ..., 'content': ...}}"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            return f"message {number} needs a 'role', one of {', '.join(ROLES)}"
        problem = check_text(message.get("content"))
        if problem:
            return f"message {number}: 'content' {problem}"
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        return "a system message may only come first"
    turns = roles[roles[0] == "system" :]
    if turns[::2] != ["user"] * len(turns[::2]) or turns[1::2] != ["assistant"] * len(turns[1::2]) or not turns:
        return f"user and assistant must take turns, user first (found: {', '.join(roles)})"
    if output_required and roles[-1] != "assistant":
        return "does not end with an assistant message; training needs the answer"
    return None


def check_text(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"is {describe(value)}, not text; put it in quotes"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; remove it"
    return None


def describe(value: Any) -> str:
    """A short name of a JSON value for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    return {list: "a list", dict: "an object", str: "text"}[type(value)]
