"""The rows of JSON text, read one after the other: a list, or JSON Lines.

Both give what json.loads would give, and its error messages with the place in the file, but hold only the next few rows
in memory.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from finetuning.cli.console import fail
from finetuning.preprocessing.schema import EXAMPLE

LONGEST = 64 << 20  # characters of one row; beyond, a bracket or a quotation mark is missing
SPACE = re.compile(r"[ \t\n\r]*")  # JSON's white space


def read_list(path: str, pieces: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON list, as json.loads would read it, with only the next few rows in memory."""
    scan = json.JSONDecoder().raw_decode
    text, line, column = next(pieces), 1, 0  # a part of the file, and the line and the column where it begins
    at, number, closed = text.index("[") + 1, 0, False

    def broken(message: str, place: int) -> None:
        lines = text.count("\n", 0, place)
        found = place - text.rindex("\n", 0, place) if lines else column + place + 1
        fail(f"{path}: not valid JSON at line {line + lines}, column {found}: {message}")

    while not closed:
        try:
            start = SPACE.match(text, at).end()
            if number == 0 and text[start : start + 1] == "]":
                fail(f"{path}: holds an empty list; it should hold rows like {EXAMPLE}")
            row, end = scan(text, start)
            end = SPACE.match(text, end).end()
            if text[end : end + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        except json.JSONDecodeError as error:
            # Perhaps only because `text` ends inside the row: near the end, or in a string that begins at error.pos.
            cut = error.pos > len(text) - 16 or text[error.pos] == '"'
            if cut and len(text) - at > LONGEST:
                broken(f"row {number + 1} has no end within {LONGEST >> 20} million characters", at)
            more = take(pieces, len(text) - at) if cut else ""
            if not more:
                broken(error.msg, error.pos)
            lines = text.count("\n", 0, at)
            line, column = line + lines, at - text.rindex("\n", 0, at) - 1 if lines else column + at
            text, at = text[at:] + more, 0
            continue
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested brackets
            fail(f"{path}: row {number + 1}: not valid JSON: {error}")
        number += 1
        yield f"row {number}", row
        at, closed = end + 1, text[end] == "]"
    for more in chain([""], pieces):
        text += more
        place = SPACE.match(text, at).end()
        if place < len(text):
            broken("Extra data", place)


def take(pieces: Iterator[str], length: int) -> str:
    """The next pieces, together at least that long if so much is left."""
    found = []
    while length >= 0 and (piece := next(pieces, "")):
        found.append(piece)
        length -= len(piece)
    return "".join(found)


def read_json_lines(path: str, lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """The rows of JSON Lines, one a line, or the only row of a file that is one object over several lines."""
    is_first = True
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError):
            whole = read_whole(chain([line], lines)) if is_first else None
            if whole is None:
                parse_json(f"{path}: line {number}", line)  # says what is wrong
            yield "the file", whole
        is_first = False


def read_whole(lines: Iterable[str]) -> Any:
    """One JSON value over several lines; None if it is none, or too long to be one row."""
    found, length = [], 0
    for line in lines:
        found.append(line)
        length += len(line)
        if length > LONGEST:
            return None
    try:
        return json.loads("".join(found))
    except (ValueError, RecursionError):
        return None


def parse_json(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        fail(f"{place}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested brackets
        fail(f"{place}: not valid JSON: {error}")
