"""Data files of every usual form, read one row after the other: memory does not grow with the file.

    .json .jsonl .csv .tsv, also as .gz or .zst      UTF-8, with or without a byte-order mark
    .parquet

A file is understood or refused, never guessed: its first bytes say what it is, and its ending only tells a table from
JSON. The JSON reader of `datasets` is not used because it guesses: it turns strings that look like dates into dates and
a columnar file into one row, and its Arrow errors do not name the row.
"""

import codecs
import gzip
import hashlib
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

from finetuning.cli.console import fail, first_line
from finetuning.preprocessing.json_rows import LONGEST, read_json_lines, read_list
from finetuning.preprocessing.schema import EXAMPLE
from finetuning.preprocessing.tables import read_parquet, read_table

CHUNK = 1 << 20  # bytes read at once
SNIFF = 1024  # bytes that say what a file is

MAGIC = {b"PAR1": "parquet", b"\x1f\x8b": "gzip", b"(\xb5/\xfd": "zstd", b"PK\x03\x04": "zip", b"BZh": "bzip2"}
MAGIC |= {b"\xfd7zXZ\x00": "xz", b"\xd0\xcf\x11\xe0": "excel", b"ARROW1": "arrow", b"version https://git-lfs": "lfs"}
TEXT_ENDINGS = ("json", "jsonl", "ndjson", "csv", "tsv")
ENDINGS = {f".{name}{packed}" for name in TEXT_ENDINGS for packed in ("", ".gz", ".zst")} | {".parquet"}
ENDINGS |= {".xlsx", ".xls", ".zip", ".bz2", ".xz", ".arrow"}  # are refused, with the way out, not passed over
PANDAS = "python -c \"import pandas; pandas.read_{0}('{1}').to_json('rows.jsonl', orient='records', lines=True)\""
UNPACK = {"gzip": "gunzip -k {0}", "zip": "unzip {0}", "zstd": "zstd -d {0}", "bzip2": "bunzip2 -k {0}"}
UNPACK |= {"xz": "unxz -k {0}", "tar": "tar xf {0}"}


def find_files(data_path: str) -> list[str]:
    """The files that a --data_path names, in natural order (part-2 before part-10), each once.

    Args:
        data_path: a file, a folder (all its data files, also in subfolders), a pattern such as data/*.jsonl, a file on
            the Hugging Face hub (hf://datasets/owner/name/file or owner/name@revision/file), or several with commas.

    Raises:
        SystemExit: code 2, if there is no such file, or a pattern or a folder has none.
    """
    parts = [data_path] if os.path.exists(data_path) or "," not in data_path else data_path.split(",")
    found = {os.path.realpath(file): file for part in parts for file in find_part(part.strip())}
    files, unpacked = sorted(found.values(), key=natural_order), {}
    for file in files:
        other = unpacked.setdefault(re.sub(r"\.(gz|zst)$", "", file), file)
        if other != file:
            fail(f"'{file}' and '{other}' look like the same rows, packed and not; move one away, or name only one")
    return files


def natural_order(path: str) -> list[Any]:
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"(\d+)", path))]


def find_part(path: str) -> list[str]:
    if path.startswith("hf://"):
        return [download(path)]
    if os.path.isfile(path):
        return [path]
    if os.path.exists(path) and not os.path.isdir(path):
        fail(f"'{path}' is not a file; name a data file, a folder or a pattern")
    matches = [path] if os.path.isdir(path) else glob(path, recursive=True)
    files = [file for match in matches for file in ([match] if os.path.isfile(match) else data_files(match))]
    if os.path.isdir(path) and not files:
        fail(f"'{path}' is not a file, and as a folder it has no data files (.json, .jsonl, .csv, .parquet, ...)")
    if not files:
        hint = "; no file matches this pattern" if set(path) & set("*?[") else ""
        fail(f"data file '{path}' does not exist{hint}")
    return files


def data_files(folder: str) -> list[str]:
    """The files in a folder and its subfolders that have a known ending and are not hidden."""
    files = [file for file in Path(folder).rglob("*") if file.is_file() and file.name.lower().endswith(tuple(ENDINGS))]
    return [str(file) for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


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
            kind = kind_of(path, file.read(SNIFF))
            file.seek(0)
            if kind == "parquet":
                yield from read_parquet(path, file)
            else:
                yield from read_text(path, unpack(path, kind, file))
        except (OSError, EOFError, zlib.error, pyarrow.ArrowException, UnicodeDecodeError) as error:
            fail(f"{path}: is damaged or not whole: {first_line(error)}; make or download it again")


def kind_of(path: str, start: bytes) -> str:
    """What a file is by its first bytes; formats that are not read are refused, with the way to one that is."""
    kind = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), "text")
    if kind == "excel" or ending(path) in (".xlsx", ".xls"):
        fail(f"{path}: is an Excel file, not JSON; convert it: {PANDAS.format('excel', path)}")
    if kind == "arrow":
        fail(f"{path}: is an Arrow file, not JSON; convert it: {PANDAS.format('feather', path)}")
    if kind == "lfs":
        fail(f"{path}: is only a Git LFS pointer; download it again, with git lfs pull")
    kind = "tar" if start[257:262] == b"ustar" else kind
    if kind in ("zip", "bzip2", "xz", "tar"):
        fail(f"{path}: is a {kind} file; unpack it first: {UNPACK[kind].format(path)}")
    if kind == "text" and path.lower().endswith(".parquet"):
        fail(f"{path}: is not a parquet file: its first bytes are not PAR1; make or download it again")
    return kind


def unpack(path: str, kind: str, file: IO[bytes]) -> Iterator[bytes]:
    """The bytes of a file, decompressed."""
    if kind == "gzip":
        file = gzip.GzipFile(fileobj=file)
    elif kind == "zstd":
        file = pyarrow.CompressedInputStream(file, "zstd")
    start = file.read(SNIFF)
    if kind != "text" and (inner := kind_of(path, start)) != "text":
        fail(f"{path}: is a packed {inner} file; unpack it first: {UNPACK[kind].format(path)}")
    return chain([start] if start else [], chunks(file))


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
    if start.lstrip()[0] == "[":
        return read_list(path, text)
    if ending(path) in (".csv", ".tsv") and start.lstrip()[0] != "{":
        return read_table(path, split_lines(path, text), "\t" if ending(path) == ".tsv" else ",")
    return read_json_lines(path, split_lines(path, text))


def ending(path: str) -> str:
    """The ending of a file's name, such as .csv, without that of its packing."""
    return Path(re.sub(r"\.(gz|zst)$", "", path.lower())).suffix


def decode(path: str, data: Iterable[bytes]) -> Iterator[str]:
    """Turn the bytes of a file into text, in pieces that are not empty."""
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    remedy = f"save it as UTF-8, for example: iconv -f {{0}} -t UTF-8 old{ending(path)} > new{ending(path)}"
    for piece in chain(data, [None]):
        if piece and not done:
            if piece.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\x00" in piece:
                fail(f"{path}: is UTF-16 or UTF-32 text, or no text at all, not UTF-8; {remedy.format('UTF-16')}")
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
