"""Data files of every usual form, read one row after the other: memory does not grow with the file.

    .json .jsonl .csv .tsv, also as .gz or .zst      UTF-8, with or without a byte-order mark
    .parquet

A file is understood or refused, never guessed. What it is, is found in its first bytes; its ending only tells tables
from JSON. The JSON reader of `datasets` is not used because it guesses: it turns strings that look like dates into
dates and a columnar file into one row, and its Arrow errors do not name the row.
"""

import codecs
import csv
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from glob import glob
from itertools import chain
from pathlib import Path
from typing import IO, Any

import pyarrow
from huggingface_hub import hf_hub_download
from pyarrow.parquet import ParquetFile

from finetuning.cli.console import fail, first_line
from finetuning.preprocessing.schema import EXAMPLE

CHUNK = 1 << 20  # bytes read at once
LONGEST = 64 << 20  # characters of one row; beyond, a bracket or a quotation mark is missing
SPACE = re.compile(r"[ \t\n\r]*")  # JSON's white space

MAGIC = {b"PAR1": "parquet", b"\x1f\x8b": "gzip", b"(\xb5/\xfd": "zstd", b"PK\x03\x04": "zip", b"BZh": "bzip2"}
MAGIC |= {b"\xfd7zXZ\x00": "xz", b"\xd0\xcf\x11\xe0": "excel", b"ARROW1": "arrow"}
TEXT_ENDINGS = ("json", "jsonl", "ndjson", "csv", "tsv")
ENDINGS = {f".{name}{packed}" for name in TEXT_ENDINGS for packed in ("", ".gz", ".zst")} | {".parquet"}
ENDINGS |= {".xlsx", ".xls", ".zip", ".bz2", ".xz", ".arrow"}  # are refused, with the way out, not passed over
PANDAS = "python -c \"import pandas; pandas.read_{0}('{1}').to_json('rows.jsonl', orient='records', lines=True)\""
UNPACK = {"gzip": "gunzip -k {0}", "zip": "unzip {0}", "zstd": "zstd -d {0}", "bzip2": "bunzip2 -k {0}"}
UNPACK |= {"xz": "unxz -k {0}"}

# Columns of tables that hold JSON text, and those whose empty cells are as if they were not there.
JSON_COLUMNS = ("messages", "conversations", "history")
ABSENT_IF_EMPTY = (*JSON_COLUMNS, "system", "reasoning_content", "task")


def find_files(data_path: str) -> list[str]:
    """The files that a --data_path names, in natural order (part-2 before part-10), each once.

    Args:
        data_path: a file, a folder (all its data files, also in subfolders), a pattern such as data/*.jsonl, a file on
            the Hugging Face hub (hf://datasets/owner/name/file or owner/name@revision/file), or several with commas.

    Raises:
        SystemExit: code 2, if there is no such file, or a pattern or a folder has none.
    """
    parts = [data_path] if Path(data_path).exists() or "," not in data_path else data_path.split(",")
    found = {os.path.realpath(file): file for part in parts for file in find_part(part.strip())}
    return sorted(found.values(), key=natural_order)


def natural_order(path: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def find_part(path: str) -> list[str]:
    if path.startswith("hf://"):
        return [download(path)]
    if Path(path).is_dir():
        files = [file for file in Path(path).rglob("*") if file.is_file() and is_data_file(file.relative_to(path))]
        if not files:
            fail(f"'{path}' is not a file, and no data file is in that folder ({', '.join(sorted(ENDINGS))})")
        return [str(file) for file in files]
    if Path(path).exists():
        if not Path(path).is_file():
            fail(f"'{path}' is not a file; name a data file, a folder or a pattern")
        return [path]
    matches = sorted(glob(path, recursive=True))
    files = [file for match in matches for file in (find_part(match) if Path(match).is_file() else [])]
    if not files:
        hint = "; no file matches this pattern" if set(path) & set("*?[") else ""
        fail(f"data file '{path}' does not exist{hint}")
    return files


def is_data_file(path: Path) -> bool:
    """Whether a file inside a folder has a known ending and is not hidden."""
    return path.name.lower().endswith(tuple(ENDINGS)) and not any(part.startswith(".") for part in path.parts)


def download(url: str) -> str:
    """The local copy of a file on the Hugging Face hub."""
    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", url)
    if not match:
        fail(f"'{url}': write it as hf://datasets/owner/name/path/in/the/repository.json")
    repository, revision, file = match.groups()
    try:
        return hf_hub_download(repository, file, repo_type="dataset", revision=revision)
    except (OSError, ValueError) as error:
        fail(f"'{url}' cannot be downloaded: {first_line(error)}")


def hash_files(paths: list[str]) -> str:
    """The SHA-256 of a file's bytes; of several files, that of their SHA-256 values one after the other."""
    digests = []
    for path in paths:
        digest = hashlib.sha256()
        with open_file(path) as file:
            for data in chunks(file):
                digest.update(data)
        digests.append(digest)
    together = hashlib.sha256(b"".join(digest.digest() for digest in digests))
    return (digests[0] if len(digests) == 1 else together).hexdigest()


def open_file(path: str) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        fail(f"{path}: cannot be read: {error.strerror}")


def read_file(path: str) -> Iterator[tuple[str, Any]]:
    """Read a data file's rows one after the other, as they are: what they mean is checked by `schema.read_row`.

    Yields:
        The place of a row as error messages name it, "row 3" or "line 3" (counted from 1), and the row.

    Raises:
        SystemExit: code 2, with a line that names the file, the place and the remedy. It may come after some rows.
    """
    with open_file(path) as file:
        try:
            kind = kind_of(path, file.read(8))
            file.seek(0)
            if kind == "parquet":
                yield from read_parquet(path, file)
            else:
                yield from read_text(path, unpack(path, kind, file))
        except (OSError, EOFError, zlib.error, pyarrow.ArrowException, UnicodeDecodeError) as error:
            fail(f"{path}: is damaged or not whole: {first_line(error)}; make or download it again")


def kind_of(path: str, start: bytes) -> str:
    """What a file is by its first bytes; formats that are not read are refused, with the way to one that is."""
    ending = Path(path).suffix.lower()
    kind = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), "text")
    if kind == "excel" or ending in (".xlsx", ".xls"):
        fail(f"{path}: is an Excel file, not JSON; convert it: {PANDAS.format('excel', path)}")
    if kind == "arrow":
        fail(f"{path}: is an Arrow file, not JSON; convert it: {PANDAS.format('feather', path)}")
    if kind in ("zip", "bzip2", "xz"):
        fail(f"{path}: is a {kind} file; unpack it first: {UNPACK[kind].format(path)}")
    if kind == "text" and ending == ".parquet":
        fail(f"{path}: is not a parquet file: its first bytes are not PAR1; make or download it again")
    return kind


def unpack(path: str, kind: str, file: IO[bytes]) -> Iterator[bytes]:
    """The bytes of a file, decompressed."""
    if kind == "gzip":
        file = gzip.GzipFile(fileobj=file)
    elif kind == "zstd":
        file = pyarrow.CompressedInputStream(file, "zstd")
    data = chunks(file)
    start = next(data, b"")
    if kind != "text" and kind_of(path, start[:8]) != "text":
        fail(f"{path}: is a packed {kind_of(path, start[:8])} file; unpack it first: {UNPACK[kind].format(path)}")
    return chain([start], data)


def chunks(file: IO[bytes]) -> Iterator[bytes]:
    while data := file.read(CHUNK):
        yield data


def read_text(path: str, data: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    """The rows of a text: a JSON list, a table if the file's ending says so, or else JSON Lines."""
    text = decode(path, data)
    start = ""
    while not start.strip():
        more = next(text, "")
        if not more:
            fail(f"{path}: is empty; it should hold a list of rows like {EXAMPLE}")
        start += more
    text = chain([start], text)
    ending = Path(path.lower().removesuffix(".gz").removesuffix(".zst")).suffix
    if start.lstrip()[0] == "[":
        return read_list(path, text)
    if ending in (".csv", ".tsv") and start.lstrip()[0] != "{":
        return read_table(path, split_lines(path, text), "\t" if ending == ".tsv" else ",")
    return read_json_lines(path, split_lines(path, text))


def decode(path: str, data: Iterable[bytes]) -> Iterator[str]:
    """Turn the bytes of a file into text, in pieces that are not empty."""
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    remedy = "save it as UTF-8, for example: iconv -f {0} -t UTF-8 old.json > new.json"
    for piece in chain(data, [None]):
        if piece and not done:
            if piece.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\x00" in piece[:1024]:
                fail(f"{path}: is UTF-16 or UTF-32 text, not UTF-8; {remedy.format('UTF-16')}")
            done = len(codecs.BOM_UTF8) if piece.startswith(codecs.BOM_UTF8) else 0
            piece = piece[done:]
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(piece or b"", final=piece is None)
        except UnicodeDecodeError as error:
            place = done - waiting + error.start
            fail(f"{path}: byte {place} is not UTF-8 (GBK, perhaps?); {remedy.format('GB18030')}")
        done += len(piece or b"")
        if text:
            yield text


def split_lines(path: str, text: Iterable[str]) -> Iterator[str]:
    """Split at \\n, which stays, and nowhere else: JSON allows U+2028, for example, inside a string."""
    parts, length, number = [], 0, 1
    for piece in text:
        first, *others = piece.split("\n")
        parts.append(first)
        length += len(first)
        if others:
            yield "".join(parts) + "\n"
            for line in others[:-1]:
                yield line + "\n"
            parts, length, number = [others[-1]], len(others[-1]), number + len(others)
        if length > LONGEST:
            fail(f"{path}: line {number}: has more than {LONGEST >> 20} million characters; split the file into rows")
    yield "".join(parts)


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


def read_table(path: str, lines: Iterator[str], delimiter: str) -> Iterator[tuple[str, Any]]:
    """The rows of a CSV or TSV file with a header line. All values are text, but those of JSON_COLUMNS."""
    csv.field_size_limit(LONGEST)
    reader, names, number = csv.reader(lines, delimiter=delimiter, strict=True), None, 0
    place, count = "line 1", 0
    try:
        for cells in reader:
            place, number = f"line {number + 1}", reader.line_num
            if not any(cells):  # a blank line, or commas only
                continue
            if names is None:
                names = column_names(f"{path}: {place}", cells)
                continue
            if len(cells) != len(names):
                fail(f"{path}: {place}: has {len(cells)} fields, and the header {len(names)}; put texts in quotes")
            row = zip(names, cells, strict=True)
            row = {name: cell for name, cell in row if cell or name not in ABSENT_IF_EMPTY}
            yield place, parse_json_columns(f"{path}: {place}", row)
            count += 1
    except csv.Error as error:
        fail(f"{path}: line {number + 1}: not valid CSV: {error}")
    if not count:
        fail(f"{path}: has a header but no rows")


def column_names(place: str, names: list[str]) -> list[str]:
    """The header of a table; a column without a name, such as pandas' index, gets one."""
    names = [name or f"column {number}" for number, name in enumerate(names, 1)]
    if len(set(names)) < len(names):
        fail(f"{place}: two columns have the same name ({', '.join(names)}); rename one")
    return names


def parse_json_columns(place: str, row: dict[str, Any]) -> dict[str, Any]:
    for name in JSON_COLUMNS:
        if isinstance(row.get(name), str):
            row[name] = parse_json(f"{place}: '{name}' in a table must be JSON text", row[name])
    return row


def read_parquet(path: str, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """The rows of a Parquet file. What is null in a row is left out of it."""
    number = 0
    with ParquetFile(file, pre_buffer=False, page_checksum_verification=True) as table:
        column_names(path, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=500):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", parse_json_columns(f"{path}: row {number}", without_nulls(row))
    if not number:
        fail(f"{path}: holds no rows; it should hold rows like {EXAMPLE}")


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value
