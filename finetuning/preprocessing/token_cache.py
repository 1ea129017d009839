"""The token cache: what was tokenised once is mapped into memory the next time.

An entry is a folder named by the key of its contents: tokens.arrow, and summary.json with the counts of the rows and
the checksum of the tokens. It gets its name when it is whole.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pyarrow as pa
import xxhash
from datasets import Dataset
from datasets.config import HF_DATASETS_CACHE
from filelock import FileLock

from finetuning.cli.console import fail, first_line, is_disk_error, say
from finetuning.preprocessing.summary import Summary

TOKENS, SUMMARY = "tokens.arrow", "summary.json"


class TokenCache:
    """A folder of entries.

    Args:
        folder: None for one in the cache of `datasets`.
        limit: of the size of all entries, in GB; those that were not used for the longest time are removed.
        is_maker: whether this process makes entries. Of several that train together on a computer one does, and the
            others wait for it.
    """

    def __init__(self, folder: str | None, limit: float, is_maker: bool = True) -> None:
        self.folder = Path(folder or Path(HF_DATASETS_CACHE, "finetuning_tokens"))
        self.limit = limit
        self.is_maker = is_maker

    def find_or_make(self, key: str, make: Callable[[Summary], Iterator[pa.RecordBatch]]) -> tuple[Dataset, Summary]:
        """The tokens and the summary under a key.

        Args:
            make: yields the tokens, and fills the summary it is given.
        """
        entry = self.folder / key
        while not self.is_maker and not is_whole(entry):
            time.sleep(1)
        if self.is_maker:
            try:
                self.make_entry(entry, make)
            except (OSError, pa.ArrowException) as error:
                if not is_disk_error(error):
                    raise
                fail(
                    f"the token cache in {self.folder} cannot be written: {first_line(error)}.\n"
                    "Make room there, or name another folder with --token_cache_dir",
                    1,
                )
        summary = json.loads((entry / SUMMARY).read_text(encoding="utf-8"))["summary"]
        return Dataset.from_file(str(entry / TOKENS)), Summary.from_json(summary)

    def make_entry(self, entry: Path, make: Callable[[Summary], Iterator[pa.RecordBatch]]) -> None:
        """Write an entry, unless there is a whole one, and make room for the next."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{entry}.lock"):  # another run may want the same
            if is_whole(entry):
                say(f"tokens read from the cache: {entry}")
            else:
                scratch = Path(f"{entry}.making")
                for path in (entry, scratch):  # a damaged entry, or what a run that was killed has left
                    shutil.rmtree(path, ignore_errors=True)
                scratch.mkdir()
                try:
                    write_entry(scratch, make)
                    scratch.rename(entry)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
        os.utime(entry)  # the time of its last use
        self.remove_oldest(keep=entry)

    def remove_oldest(self, keep: Path) -> None:
        """Remove the entries that were not used for the longest time, until the others are below the limit."""
        entries = sorted(
            (path for path in self.folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime
        )
        sizes = {entry: sum(file.stat().st_size for file in entry.iterdir()) for entry in entries}
        for entry in entries:
            if sum(sizes.values()) <= self.limit * 10**9:
                return
            if entry != keep:
                shutil.rmtree(entry, ignore_errors=True)
                del sizes[entry]


def write_entry(folder: Path, make: Callable[[Summary], Iterator[pa.RecordBatch]]) -> None:
    summary = Summary()
    batches = make(summary)
    first = next(batches)
    with pa.OSFile(str(folder / TOKENS), "wb") as file, pa.ipc.new_stream(file, first.schema) as writer:
        for batch in chain([first], batches):
            writer.write_batch(batch)
    description = {"checksum": checksum(folder / TOKENS), "summary": summary.to_json()}
    (folder / SUMMARY).write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")


def is_whole(entry: Path) -> bool:
    """Whether an entry is there and its tokens are those that were written."""
    try:
        description = json.loads((entry / SUMMARY).read_text(encoding="utf-8"))
        return description["checksum"] == checksum(entry / TOKENS)
    except (OSError, ValueError, KeyError):
        return False


def checksum(file: Path) -> str:
    """A fast checksum against damage, not against forgery."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()
