"""Step 2: the rows of a file as they stand there, one after the other: JSON list, JSON Lines, CSV, TSV, Parquet.

Memory does not grow with the file. The JSON reader of `datasets` is not used because it guesses: it turns strings that
look like dates into dates and a columnar file into one row, and its Arrow errors do not name the row.
"""

import csv
import json
import re
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from typing import IO, Any

import pyarrow as pa
from pyarrow.parquet import ParquetFile

from finetuning.cli.console import first_line
from finetuning.preprocessing.files import CHUNK, COMPRESSED_ENDING, DataError, decode, decompress, open_file

LONGEST = 64 << 20  # characters of one row; beyond, a bracket or a quotation mark is missing
OBJECT = re.compile(rb"\[?\s*\{")  # JSON that is called .csv
SPACE = re.compile(r"[ \t\n\r]*")  # JSON's white space
UNREAD_TYPES = (pa.types.is_nested, pa.types.is_binary, pa.types.is_large_binary)  # of columns that mean nothing here
NOT_READ = object()  # stands for a value of a Parquet column that is not read

Rows = Iterator[tuple[str, Any]]  # "row 3" or "line 3", counted from 1, and what stands there


def read_file(path: str, fields: Collection[str]) -> Rows:
    """Read the rows of a data file, as they are: what they mean is checked by `rows.normalize_row`.

    Args:
        fields: columns of a Parquet file that are read whatever their type; of the others, lists and bytes are not.

    Raises:
        DataError: for a file that is damaged or of another format. It may come after some rows.
    """
    name = COMPRESSED_ENDING.sub("", path.lower())
    with open_file(path) as file:
        try:
            stream, start = decompress(path, file)
            start = start.removeprefix(BOM_UTF8).lstrip(b" \t\r\n")
            if start.startswith(b"PAR1"):
                yield from read_parquet(stream, fields)
            elif name.endswith((".csv", ".tsv")) and not OBJECT.match(start):
                yield from read_table(read_lines(stream), "," if name.endswith(".csv") else "\t")
            elif start.startswith(b"["):
                yield from read_json_list(decode(iter(lambda: stream.read(CHUNK), b"")))
            else:
                yield from read_json_lines(read_lines(stream))
        except (OSError, EOFError, pa.ArrowException) as error:
            message = f"is damaged or not complete: {first_line(error)}; make or download it again"
            raise DataError(message) from None


def read_lines(stream: IO[bytes]) -> Iterator[str]:
    """The lines of a text, split at \\n and nowhere else: JSON allows U+2028, for example, inside a string."""
    for number, line in enumerate(decode(iter(lambda: stream.readline(LONGEST), b"")), 1):
        if not line.endswith("\n") and stream.peek(1):
            raise DataError(
                f"line {number}: has more than {LONGEST >> 20} million characters; split the file into rows"
            )
        yield line


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"two fields have the name '{name}'; remove one")
    return fields


DECODER = json.JSONDecoder(object_pairs_hook=unique_fields)


def parse_json(text: str) -> Any:
    """The value of a JSON text; a ValueError if it is not valid, or an object has two fields of one name."""
    try:
        return DECODER.decode(text)
    except RecursionError as error:  # thousands of nested brackets
        raise ValueError(str(error)) from None


def read_json_list(pieces: Iterator[str]) -> Rows:
    """The rows of a JSON list, as json.loads would read them; memory holds the current row and the rest of a piece."""
    text = next(pieces)
    number, at, closed = 1, text.index("[") + 1, False
    while not closed:
        try:
            start = SPACE.match(text, at).end()
            if number == 1 and text[start : start + 1] == "]":
                at = start + 1
                break
            row, end = DECODER.raw_decode(text, start)
            end = SPACE.match(text, end).end()
            if text[end : end + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        except json.JSONDecodeError as error:
            # Perhaps only because the row continues in the next piece.
            is_cut = error.pos > len(text) - 16 or error.msg.startswith("Unterminated string")
            if is_cut and len(text) - at > LONGEST:
                raise DataError(f"row {number}: has no end within {LONGEST >> 20} million characters") from None
            more = take(pieces, len(text) - at) if is_cut else ""
            if not more:
                near = text[max(at, error.pos - 20) : error.pos + 20]
                raise DataError(f"row {number}: not valid JSON: {error.msg}, near {near!r}") from None
            text, at = text[at:] + more, 0
            continue
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits
            raise DataError(f"row {number}: not valid JSON: {error}") from None
        yield f"row {number}", row
        number, at, closed = number + 1, end + 1, text[end] == "]"
    for more in chain([text[at:]], pieces):
        if not SPACE.fullmatch(more):
            raise DataError("not valid JSON: more text after the end of the list")


def take(pieces: Iterator[str], length: int) -> str:
    """The next pieces, together longer than `length` if so much is left: a long row is read in linear time."""
    found = []
    while length >= 0 and (piece := next(pieces, "")):
        found.append(piece)
        length -= len(piece)
    return "".join(found)


def read_json_lines(lines: Iterator[str]) -> Rows:
    """The rows of JSON Lines, one a line, or the only row of a file that is one object over several lines."""
    is_first = True
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", parse_json(line)
        except ValueError as error:
            try:
                row = parse_json(line + take(lines, LONGEST)) if is_first else None
            except ValueError:
                row = None
            if row is None:
                raise DataError(f"line {number}: not valid JSON: {error}") from None
            yield "the file", row
        is_first = False


def read_table(lines: Iterable[str], delimiter: str) -> Rows:
    """The rows of a CSV or TSV file with a header line; all values are text."""
    csv.field_size_limit(LONGEST)
    record: list[str] = []  # the lines of the current row
    reader = csv.reader((record.append(line) or line for line in lines), delimiter=delimiter, strict=True)
    names, end = None, 0
    try:
        for cells in reader:
            raw, location, end = record.copy(), f"line {end + 1}", reader.line_num
            record.clear()
            if not any(cells):  # a blank line, or commas only
                continue
            if names is None:
                names = column_names(cells)
                if len(names) == 1 and {";", "\t"} & set(names[0]):
                    raise DataError(f"{location}: holds one column ({names[0]!r}); separate columns by commas")
                continue
            if len(cells) != len(names):
                counts = f"has {len(cells)} fields, and the header {len(names)}"
                raise DataError(f"{location}: {counts}; put texts in quotes, with no space before them")
            is_spaced = any(cell.startswith(" ") and cell.lstrip(" ").startswith('"') for cell in cells)
            if is_spaced and cells != next(csv.reader(raw, delimiter=delimiter, skipinitialspace=True)):
                raise DataError(f"{location}: a space before a quotation mark makes it a part of the text; remove it")
            yield location, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"line {end + 1}: not valid CSV: {error}; is a quotation mark missing?") from None


def column_names(names: list[str]) -> list[str]:
    """The header of a table; a column without a name, such as pandas' index, gets one."""
    names = [name or f"column {number}" for number, name in enumerate(names, 1)]
    if len(set(names)) < len(names):
        raise DataError(f"two columns have the same name ({', '.join(map(repr, names))}); rename one")
    return names


def read_parquet(file: IO[bytes], fields: Collection[str]) -> Rows:
    number = 0
    with ParquetFile(file, pre_buffer=False, page_checksum_verification=True) as table:
        names = column_names(table.schema_arrow.names)
        others = {field.name: field.type for field in table.schema_arrow if field.name not in fields}
        unread = {name: NOT_READ for name, type in others.items() if any(is_kind(type) for is_kind in UNREAD_TYPES)}
        dates = [name for name, type in others.items() if pa.types.is_temporal(type)]
        for batch in table.iter_batches(batch_size=500, columns=[name for name in names if name not in unread]):
            for name in dates:  # as text: Python's dates end with the year 9999
                batch = batch.set_column(batch.schema.get_field_index(name), name, batch[name].cast(pa.string()))
            try:
                rows = batch.to_pylist()
            except (ValueError, OverflowError) as error:  # text that is not UTF-8, for example
                raise DataError(f"a row after row {number} cannot be read: {first_line(error)}") from None
            for row in rows:
                number += 1
                yield f"row {number}", row | unread
