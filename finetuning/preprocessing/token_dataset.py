"""From data files to a dataset of token ids: rows pass by in chunks, and only their tokens are kept.

Small files are tokenised here and now, and kept in memory. Large ones are tokenised by several processes, and written
to the token cache, a file that is mapped into memory: see token_cache.py.
"""

import hashlib
import inspect
import multiprocessing
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetuning.cli.console import fail, progress_bar, say
from finetuning.preprocessing.files import find_files, hash_files
from finetuning.preprocessing.prompts import IGNORE_INDEX, split_turns, stop_token_ids
from finetuning.preprocessing.rows import check_renamed, count_unread, read_files
from finetuning.preprocessing.schema import RowError, read_row, rename_fields
from finetuning.preprocessing.summary import Summary
from finetuning.preprocessing.thoughts import has_thought, without_thoughts
from finetuning.preprocessing.token_cache import TokenCache

CHUNK = 500  # rows
SMALL = 8 * 2**20  # bytes of the files
INTEGERS = pa.list_(pa.int32())
SCHEMA = pa.schema({"input_ids": INTEGERS, "labels": INTEGERS, "length": pa.int32(), "row_number": pa.int64()})

# Turns rows into `input_ids` and `labels`, given the longest length: `common.preprocess_function`.
PreprocessFunction = Callable[[list[dict[str, Any]], PreTrainedTokenizerBase, int], list[dict[str, list[int]]]]
# A row as it stands in a file, behind its place in words: the file and the row or line.
RawRow = tuple[str, Any]


@dataclass
class ChunkTokenizer:
    """Checks, renders and tokenises chunks of rows: all that a process needs to know for it."""

    preprocess_function: PreprocessFunction
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    thinking: str = "auto"  # "off" leaves the thoughts of the rows out
    rename: dict[str, str] = field(default_factory=dict)  # our name of a field, by the one it has in the files

    def __call__(self, chunk: list[RawRow]) -> tuple[pa.RecordBatch, Summary]:
        """Tokenise rows.

        Returns:
            An example for each row or, if the template rewrites earlier turns, for each answer: `input_ids`, `labels`,
            `length` and `row_number`, counted from 1 in the chunk; and the counts of the rows.

        Raises:
            RowError: for a row that cannot be used; the message names its place.
        """
        rows, renamed = [], Counter()
        for place, row in chunk:
            try:
                rows.append(read_row(rename_fields(row, self.rename), output_required=True))
            except RowError as error:
                raise RowError(f"{place}: {error}") from None
            renamed.update(self.rename.keys() & row.keys())
        summary = Summary(unread=count_unread(rows), renamed=renamed)
        parts: list[dict[str, Any]] = []
        row_numbers: list[int] = []
        for number, row in enumerate(rows, 1):
            summary.add_row(row)
            if has_thought(row) and self.thinking == "off":
                row = without_thoughts(row)
                summary.thoughts_left_out += 1
            elif has_thought(row):
                summary.thoughts += 1
            split = split_turns(row, self.tokenizer)
            parts += split
            row_numbers += [number] * len(split)
        examples = self.preprocess_function(parts, self.tokenizer, self.max_length)
        stop_ids = stop_token_ids(self.tokenizer)
        learnt = [len(example["labels"]) - example["labels"].count(IGNORE_INDEX) for example in examples]
        used = {number for number, count in zip(row_numbers, learnt, strict=True) if count}
        ended = [example["input_ids"][-1] in stop_ids for example in examples]
        open_ended = {number for number, has_end in zip(row_numbers, ended, strict=True) if not has_end}
        summary.dropped = len(chunk) - len(used)
        summary.cut = len(used & open_ended)
        summary.whole = len(used - open_ended)
        kept = [place for place, count in enumerate(learnt) if count]
        ids = [examples[place]["input_ids"] for place in kept]
        summary.examples, summary.tokens, summary.learnt = len(kept), sum(map(len, ids)), sum(learnt)
        columns = {
            "input_ids": ids,
            "labels": [examples[place]["labels"] for place in kept],
            "length": list(map(len, ids)),
            "row_number": [row_numbers[place] for place in kept],
        }
        return pa.RecordBatch.from_pydict(columns, SCHEMA), summary


def make_dataset(
    data_path: str,
    tokenize_chunk: ChunkTokenizer,
    max_rows: int | None = None,
    num_workers: int | None = None,
    cache: TokenCache | None = None,
) -> tuple[Dataset, Summary]:
    """Read, check and tokenise data files, or read their tokens from the cache.

    Args:
        data_path: as in `find_files`.
        max_rows: read only the first rows.
        num_workers: processes for large files; None for one on each core.
        cache: None keeps all tokens in memory.

    Returns:
        A dataset with the columns of `ChunkTokenizer`, where `row_number` counts over all files; and its summary.

    Raises:
        SystemExit: code 2, with a line that names the file, the row, the field and the remedy.
    """
    paths = find_files(data_path)
    if len(paths) > 1:
        say(f"{data_path}: {len(paths)} files, from {paths[0]} to {paths[-1]}")
    large = sum(Path(path).stat().st_size for path in paths) > SMALL
    workers = (num_workers or count_cores()) if large else 1

    def read_tokens(summary: Summary) -> Iterator[pa.RecordBatch]:
        chunks = split_into_chunks(islice(read_files(paths), max_rows))
        try:
            with progress_bar(f"tokenizing {data_path}", "rows") as bar:
                for batch, counts in map_in_order(tokenize_chunk, chunks, workers):
                    numbers = pc.add(batch["row_number"], summary.rows)
                    yield batch.set_column(batch.schema.get_field_index("row_number"), "row_number", numbers)
                    summary.add(counts)
                    bar.update(counts.rows)
            check_renamed(data_path, tokenize_chunk.rename, summary.renamed)
        except RowError as error:
            fail(str(error))
        except BrokenProcessPool:
            fail(
                f"{data_path}: a process that tokenises was killed, perhaps for want of memory; "
                f"try --preprocessing_num_workers {max(1, workers // 2)}",
                1,
            )

    sha256 = hash_files(paths)
    if cache and large:
        key = make_key(sha256, max_rows, tokenize_chunk)
        dataset, summary = cache.find_or_make(key, read_tokens)
    else:
        summary = Summary()
        dataset = Dataset(pa.Table.from_batches(read_tokens(summary), SCHEMA))
    summary.path, summary.sha256 = data_path, sha256
    return dataset, summary


def split_rows(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Hold out a random share of the rows, all examples of a row together; returns what is left, and the share."""
    row_numbers = dataset.with_format("numpy")["row_number"][:]
    rows = np.unique(row_numbers)
    if len(rows) < 2:
        fail("--eval_split: there is only one row; leave the flag out")
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    held_out = np.isin(row_numbers, np.random.default_rng(seed).choice(rows, count, replace=False))
    return dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))


def row_lengths(dataset: Dataset) -> list[int]:
    """The lengths of the examples, in tokens."""
    return dataset.with_format("numpy")["length"][:].tolist()


def make_key(sha256: str, max_rows: int | None, tokenize_chunk: ChunkTokenizer) -> str:
    """A name for the tokens of some rows, which changes with everything that they depend on: the data, the tokenizer,
    the flags, the versions of the libraries, and the code of this room and of `preprocess_function`.
    """
    tokenizer, function = tokenize_chunk.tokenizer, tokenize_chunk.preprocess_function
    parts = [sha256, max_rows, tokenize_chunk.max_length, tokenize_chunk.thinking, tokenize_chunk.rename]
    parts += [tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.backend_tokenizer.to_str()]
    parts += [version(name) for name in ("tokenizers", "transformers")]
    sources = [*sorted(Path(__file__).parent.glob("*.py")), Path(inspect.getsourcefile(function))]
    parts += [source.read_text(encoding="utf-8") for source in sources]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def split_into_chunks(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    rows = iter(rows)
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(function: ChunkTokenizer, chunks: Iterator[list[RawRow]], workers: int) -> Iterator[Any]:
    """`map` by several processes, which never holds more than a few chunks.

    The first chunk is worked on here: what is wrong with the chat template is then told once.
    """
    yield from map(function, islice(chunks, 1 if workers > 1 else None))
    if workers == 1:
        return
    # a copy of this process knows the tokenizer; elsewhere than on Linux copies are not safe
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(workers, context, start_worker, (function,)) as pool:
        waiting: deque[Future] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(run_worker, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


def start_worker(function: ChunkTokenizer) -> None:
    """Prepare a process of `map_in_order`: it uses one core, leaves Ctrl-C to its parent, and ends with it."""
    global work
    work = function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def run_worker(chunk: list[RawRow]) -> tuple[pa.RecordBatch, Summary]:
    return work(chunk)
