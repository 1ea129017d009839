"""Step 1: the files that a --data_path names, and their bytes. The first bytes of a file say what it is."""

import codecs
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from glob import glob
from itertools import chain
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

import pyarrow
from huggingface_hub import HfFileSystem, hf_hub_download

from finetuning.cli.console import first_line

EXAMPLE = '{"instruction": "翻译为英文", "input": "你好", "output": "Hello"}'
CHUNK = 1 << 20  # bytes read at once
SNIFF = 1024  # bytes that tell what a file is

TEXT_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
ENDINGS = tuple(name + more for name in TEXT_ENDINGS for more in ("", ".gz", ".zst", ".bz2"))
ENDINGS += (".parquet", ".xlsx", ".xls", ".zip", ".xz", ".arrow")  # some are refused, but none is passed over
COMPRESSED_ENDING = re.compile(r"\.(gz|zst|bz2)$")
SPLIT = re.compile(r"(?<![a-z])(?:train|test|dev|eval|valid|val)(?:ing|uation|idation|ation)?(?![a-z])")
HUB_FILE = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@(refs/[^/]+/[^/]+|[^/]+))?/(.+)")
COMPRESSED = {b"\x1f\x8b": "gzip", b"(\xb5/\xfd": "zstd", b"BZh": "bz2"}  # the names are pyarrow's

CONVERT = "convert it: python -c \"import {0}; {0}.{1}('{{0}}').to_json('rows.jsonl', orient='records', lines=True)\""
EXCEL = f"is an Excel file, not JSON; {CONVERT.format('pandas', 'read_excel')}"
ARROW = "is an Arrow file, not JSON; " + CONVERT
ICONV = "save it as UTF-8, for example: iconv -f {} -t UTF-8 old > new"
UTF_16 = f"is UTF-16 or UTF-32 text, or no text at all, not UTF-8; {ICONV.format('UTF-16')}"
# The first bytes of formats that are not read, and what to do about it.
REFUSED = {
    b"PK\x03\x04": "is a zip file; decompress it first: unzip {0}",
    b"\xfd7zXZ\x00": "is an xz file; decompress it first: unxz -k {0}",
    b"\xd0\xcf\x11\xe0": EXCEL,
    b"ARROW1": ARROW.format("pandas", "read_feather"),
    b"\xff\xff\xff\xff": ARROW.format("datasets", "Dataset.from_file"),  # a stream, as `save_to_disk` writes it
    b"version https://git-lfs": "is only a Git LFS pointer; download it again, with git lfs pull",
    codecs.BOM_UTF16_LE: UTF_16,
    codecs.BOM_UTF16_BE: UTF_16,
}


class DataError(ValueError):
    """Data that cannot be used; the message says why, and what to do. `rows.read_rows` adds the file and the row."""


def find_files(data_path: str) -> list[str]:
    """The files that a --data_path names, each once, in the order of its parts, and in natural order within a part.

    Args:
        data_path: a file, a folder (all its data files, also in subfolders), a pattern such as data/*.jsonl, files on
            the Hugging Face hub (hf://datasets/owner/name/file or owner/name@revision/*.parquet), or several of these
            with commas between.

    Raises:
        DataError: if there is no such file, or a pattern or a folder has none.
    """
    files: dict[str, str] = {}
    parts = [data_path] if os.path.exists(data_path) else [part.strip() for part in data_path.split(",")]
    for part in list(filter(None, parts)) or [data_path]:
        find = download if part.startswith("hf://") else find_local
        files |= {os.path.realpath(file): file for file in find(part)}
    decompressed: dict[str, str] = {}
    for file in files.values():
        other = decompressed.setdefault(COMPRESSED_ENDING.sub("", file), file)
        if other != file:
            problem = f"'{file}' and '{other}' look like the same rows, compressed and not"
            raise DataError(f"{problem}; move one away, or name only one")
    return list(files.values())


def find_splits(files: list[str]) -> list[str]:
    """The splits, such as test, that the paths of files name below the folder that they share; none if all have one."""
    shared = os.path.commonpath(map(os.path.dirname, files)) or "."
    splits = [SPLIT.findall(os.path.relpath(file, shared).lower()) for file in files]
    names = sorted({name for found in splits for name in found})
    return names if names != ["train"] and any(found != splits[0] for found in splits) else []


def find_local(path: str) -> list[str]:
    """The files that a path or a pattern names; of folders, those with a known ending that are not hidden."""
    files, exists = [], os.path.exists(path)
    for match in [path] if exists else glob(path, recursive=True):
        found = [Path(match)] if os.path.isfile(match) else Path(match).rglob("*")
        for file in found:
            inside = os.path.relpath(file, match).split(os.sep)  # of the folder; ["."] for the file that is named
            is_hidden = any(part.startswith(".") for part in inside) and inside != ["."]
            if inside == ["."] or not is_hidden and file.name.lower().endswith(ENDINGS) and file.is_file():
                files.append(str(file))
    if not files and exists:
        raise DataError(f"'{path}' is not a file, and as a folder it has no data files (.json, .csv, .parquet, ...)")
    if not files:
        hint = "; no file matches this pattern" if set(path) & set("*?[") else ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).suffix:
            hint = f"; for a data set on the hub write hf://datasets/{path}/*.parquet, or the path of its files there"
        raise DataError(f"data file '{path}' does not exist{hint}")
    return sorted(files, key=natural_order)


def natural_order(path: str) -> tuple[list[Any], str]:
    """A key that sorts part-2 before part-10, and part-01 always before part-1."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"(\d+)", path))], path


def download(url: str) -> list[str]:
    """The local copies of the files on the Hugging Face hub that a URL or a pattern names."""
    files = []
    try:
        urls = [f"hf://{path}" for path in HfFileSystem().glob(url)] if set(url) & set("*?[") else [url]
        for match in map(HUB_FILE.fullmatch, sorted(urls, key=natural_order)):
            if not match:
                raise DataError(f"'{url}': write it as hf://datasets/owner/name/path/in/the/repository.json")
            revision = match[2] and unquote(match[2])
            files.append(hf_hub_download(match[1], match[3], repo_type="dataset", revision=revision))
    except (OSError, ImportError) as error:  # ImportError: a SOCKS proxy needs a package
        raise DataError(f"'{url}' cannot be downloaded: {first_line(error)}") from None
    if not files:
        raise DataError(f"data file '{url}' does not exist; no file matches this pattern")
    return files


def hash_files(paths: list[str]) -> str:
    """The SHA-256 of a file's bytes; of several files, that of their SHA-256 values one after the other."""
    digests = []
    for path in paths:
        digest = hashlib.sha256()
        with open_file(path) as file:
            while data := file.read(CHUNK):
                digest.update(data)
        digests.append(digest)
    together = hashlib.sha256(b"".join(digest.digest() for digest in digests))
    return (digests[0] if len(digests) == 1 else together).hexdigest()


def open_file(path: str) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def decompress(path: str, file: IO[bytes]) -> tuple[IO[bytes], bytes]:
    """The decompressed bytes of an open file as a stream, and the first SNIFF of them.

    Raises:
        DataError: for a format that is not read; it says how to convert it.
    """
    start, ending = file.read(SNIFF), Path(path.lower()).suffix
    file.seek(0)
    compression = next((name for magic, name in COMPRESSED.items() if start.startswith(magic)), None)
    if compression:
        file = io.BufferedReader(pyarrow.CompressedInputStream(file, compression))
        start = file.peek(SNIFF)[:SNIFF]
    is_parquet = start.startswith(b"PAR1")
    reasons = [EXCEL] if ending in (".xlsx", ".xls") else []
    reasons += [reason for magic, reason in REFUSED.items() if start.startswith(magic)]
    reasons += ["is a tar file; extract it first: tar xf {0}"] if start[257:262] == b"ustar" else []
    if is_parquet and compression:
        reasons.append(f"is a compressed Parquet file, with {compression}; decompress it first")
    if ending == ".parquet" and not is_parquet:
        reasons.append("is not a Parquet file: its first bytes are not PAR1; make or download it again")
    reasons += [UTF_16] if b"\x00" in start and not is_parquet else []
    if reasons:
        raise DataError(reasons[0].format(path))
    return file, start


def decode(pieces: Iterable[bytes]) -> Iterator[str]:
    """Decode the pieces of a UTF-8 text, which may begin with a byte-order mark; a bad byte is named by its line."""
    decoder, line = codecs.getincrementaldecoder("utf-8-sig")(), 1
    for piece in chain(pieces, [b""]):
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            good = error.object[: error.object.rfind(b"\n", 0, error.start) + 1].decode()  # the lines before are read
            if good:
                yield good
            line += good.count("\n")
            raise DataError(f"line {line}: is not UTF-8 (GBK, perhaps?); {ICONV.format('GB18030')}") from None
        line += piece.count(b"\n")
        if text:
            yield text
