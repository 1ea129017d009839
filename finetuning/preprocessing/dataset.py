"""Step 6: the examples of a run, to train and to evaluate on.

Rows are read, checked and tokenised in one pass. Small files stay in memory; large ones are mapped into memory from the
token cache, which keeps them for the next run.
"""

import hashlib
import inspect
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, Features, List, Value
from datasets.config import HF_DATASETS_CACHE
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from finetuning.cli.console import fail, first_line, is_main_process, progress_bar, say, warn
from finetuning.preprocessing.encode import IGNORE_INDEX, Example, encode_together
from finetuning.preprocessing.files import DataError, find_files, find_splits, hash_files
from finetuning.preprocessing.flags import DataArguments
from finetuning.preprocessing.rows import Row, read_rows, to_record
from finetuning.preprocessing.summary import Summary, print_summary, summarize

SMALL = 8 * 2**20  # bytes of the files
BATCH_ROWS, BATCH_CHARACTERS = 500, 2**22  # that are tokenised at once, whichever is less

# An example, the number of its row, from 1 over all files, and whether its end was cut off.
EXAMPLE = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "length": Value("int32")})
EXAMPLE |= {"row_number": Value("int64"), "supervised": Value("int32"), "is_truncated": Value("bool")}
# The first example of a row has the row, as JSON text, so that no type is guessed, and what the summary counts, such as
# whether supervised tokens were cut off.
TABLE = EXAMPLE | {name: Value("string") for name in ("row", "task", "label", "ignored")}
TABLE = Features(TABLE | {name: Value("bool") for name in ("has_reasoning", "is_empty", "is_cut")})

PreprocessFunction = Callable[[Row, PreTrainedTokenizerBase], list[Example]]  # `common.preprocess_function`


class Data:
    """What a run trains or evaluates on.

    Attributes:
        dataset: the examples in which something is supervised, with the columns of EXAMPLE.
    """

    def __init__(self, table: Dataset, summary: Summary) -> None:
        self.table, self.summary = table, summary
        left = np.flatnonzero(read_column(table, "length"))
        self.dataset = (table if len(left) == len(table) else table.select(left)).select_columns(list(EXAMPLE))

    def read_rows(self) -> list[Row]:
        return [json.loads(row) for row in self.table["row"] if row is not None]


def read_column(table: Dataset, name: str) -> np.ndarray:
    return table.select_columns(name).with_format("arrow")[:][name].to_numpy()


def load_training_data(
    args: DataArguments, function: PreprocessFunction, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[Data, Data | None]:
    """The rows to train on and, if there are any, those to evaluate on: of files of their own, or a random share.

    Raises:
        DataError: with the file, the row, the field and the remedy.
    """
    train = read_data(args.data_path, args.max_rows, args, function, tokenizer)
    evaluation = None
    if args.eval_split:
        train, evaluation = (Data(part, train.summary) for part in split_rows(train.table, args.eval_split, seed))
    elif args.eval_data_path:
        evaluation = read_data(args.eval_data_path, None, args, function, tokenizer)
    if PartialState().is_local_main_process:  # each machine may have a cache of its own
        remove_oldest(cache_folder(args), args.token_cache_gb)
    return train, evaluation


def split_rows(table: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Hold out a random share of the rows of which something is left: the other rows' examples, and theirs."""
    row_numbers = read_column(table, "row_number")
    numbers = np.unique(row_numbers[read_column(table, "length") > 0])
    if len(numbers) < 2:
        raise DataError("--eval_split: there is only one row; leave the flag out")
    size = min(max(1, round(share * len(numbers))), len(numbers) - 1)
    rows = Dataset.from_dict({"row_number": numbers})
    is_held_out = np.isin(row_numbers, rows.train_test_split(size, seed=seed)["test"]["row_number"])
    return table.select(np.flatnonzero(~is_held_out)), table.select(np.flatnonzero(is_held_out))


def read_data(
    data_path: str, max_rows: int | None, args: DataArguments, function: PreprocessFunction, tokenizer: Any
) -> Data:
    """Read, check and tokenise files, or find their examples in the cache, and print their summary."""
    files = find_files(data_path)
    if len(files) > 1:
        say(f"{data_path}: {len(files)} files, from {files[0]} to {files[-1]}")
        if splits := find_splits(files) if "," not in data_path else []:
            names = f"{', '.join(splits)}), and all files are read; name some, with a pattern such as '*{splits[-1]}*'"
            warn(f"{data_path} holds several splits ({names}")
    (sha256,) = broadcast_object_list([hash_files(files) if is_main_process() else None])
    drop_reasoning = args.thinking == "off"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # our threads are enough, one for each batch

    def write(sink: pa.NativeFile) -> None:
        rows = read_rows(data_path, files, args.rename, True, max_rows)
        records = (to_record(*row, drop_reasoning) for row in rows)
        encode = partial(function, tokenizer=tokenizer)
        tokenize = partial(tokenize_rows, function=encode, max_length=args.max_length)
        write_table(records, tokenize, sink, args.preprocessing_num_workers, f"reading {data_path}")

    if sum(map(os.path.getsize, files)) > SMALL:
        entry = cache_folder(args) / make_key(sha256, files, max_rows, args, function, tokenizer)
        table = Dataset.from_file(get_or_create(entry, write))
    else:
        write(sink := pa.BufferOutputStream())
        table = Dataset.from_buffer(sink.getvalue())
    summary = summarize(table, data_path, sha256, drop_reasoning)
    print_summary(summary, args.max_length, tokenizer)
    return Data(table, summary)


def write_table(
    records: Iterator[dict[str, Any]], tokenize: Callable[..., pa.RecordBatch], sink: Any, threads: int, title: str
) -> None:
    """Write TABLE as an Arrow stream, batch by batch.

    Threads tokenise while this one reads; a batch for each is in memory. `Dataset.map`, which begins after the last row
    is read, took longer: with two cores 1.5 times as long as the tokenizer alone, and this 1.2 times.
    """
    with sink, pa.ipc.new_stream(sink, TABLE.arrow_schema) as stream, ThreadPoolExecutor(threads) as pool:
        pending, number = deque[Future](), 1
        with progress_bar(title, "rows") as bar:
            for batch in split_into_batches(records):
                pending.append(pool.submit(tokenize, batch, number))
                number += len(batch)
                bar.update(len(batch))
                if len(pending) > threads:
                    stream.write_batch(pending.popleft().result())
        for future in pending:
            stream.write_batch(future.result())


def split_into_batches(records: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch, characters = [], 0
    for record in records:
        batch.append(record)
        characters += len(record["row"])
        if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def tokenize_rows(
    records: list[dict[str, Any]], number: int, function: Callable[[Row], list[Example]], max_length: int
) -> pa.RecordBatch:
    """A part of TABLE from rows that are counted from `number`; a row of which nothing is left has an empty example.

    Examples longer than `max_length` lose their end, and with it the stop token.
    """
    of_rows: list[list[Example]] = []
    for record in records:
        try:
            of_rows.append(function(json.loads(record["row"])))
        except DataError as error:
            raise DataError(f"{record['location']}: {error}") from None
    encode_together(list(chain.from_iterable(of_rows)))
    examples = []
    for row_number, (record, of_row) in enumerate(zip(records, of_rows, strict=True), number):
        left, is_cut = [], False
        for example in of_row:
            input_ids, labels = (example[name][:max_length] for name in ("input_ids", "labels"))
            supervised, is_truncated = count_supervised(labels), len(example["labels"]) > max_length
            is_cut |= supervised < count_supervised(example["labels"])
            if supervised:
                left.append((input_ids, labels, len(labels), row_number, supervised, is_truncated))
        for values in left or [([], [], 0, row_number, 0, False)]:
            examples.append(record | dict(zip(EXAMPLE, values, strict=True), is_cut=is_cut))
            record = {}
    return pa.RecordBatch.from_pylist(examples, TABLE.arrow_schema)


def count_supervised(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORE_INDEX)


# ---- token cache: a folder with an entry, a folder of its own, for each key


def cache_folder(args: DataArguments) -> Path:
    return Path(args.token_cache_dir or Path(HF_DATASETS_CACHE, "finetuning_tokens"))


def make_key(
    sha256: str, files: list[str], max_rows: int | None, args: DataArguments, function: Callable, tokenizer: Any
) -> str:
    """A name for tokens that changes with the data, the flags, the tokenizer, the versions of the libraries, and the
    code of this folder and of `preprocess_function`: `datasets` would keep the tokens after an edit of a module."""
    parts = [sha256, [Path(file).suffixes for file in files], max_rows, args.max_length, args.thinking == "off"]
    parts += [args.rename, tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.backend_tokenizer.to_str()]
    parts += [version(name) for name in ("datasets", "jinja2", "pyarrow", "tokenizers", "transformers")]
    parts += [date.today()] if "strftime_now" in tokenizer.chat_template else []
    sources = [*sorted(Path(__file__).parent.glob("*.py")), Path(inspect.getsourcefile(function))]
    parts += [source.read_text(encoding="utf-8") for source in sources]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


IN_USE: list[FileLock] = []  # on entries, until this process ends


def get_or_create(entry: Path, create: Callable[[pa.NativeFile], None]) -> str:
    """The file of an entry, which `create` writes unless it is there. Other processes wait meanwhile."""
    path, part = entry / "examples.arrow", entry / "part"
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{entry}.lock"):
            entry.mkdir(exist_ok=True)  # which another process may have removed meanwhile
            if path.exists():
                say(f"tokens read from the cache: {entry}")
            else:
                try:
                    create(pa.OSFile(str(part), "wb"))
                except BaseException:
                    shutil.rmtree(entry, ignore_errors=True)
                    raise
                part.replace(path)
            path.touch()  # the time of its last use
            IN_USE.append(FileLock(entry / f"{uuid4().hex}.lock"))
            IN_USE[-1].acquire()
    except OSError as error:
        message = f"the token cache in {entry.parent} cannot be written: {first_line(error)}."
        fail(f"{message}\nMake room there, or name another folder with --token_cache_dir", 1)
    return str(path)


def remove_oldest(folder: Path, limit: float) -> None:
    """Remove the entries that were not used for longest, but none in use, until all have at most `limit` GB."""
    files = {entry: entry / "examples.arrow" for entry in folder.glob("*") if entry.is_dir()}
    used = {entry: file.stat().st_mtime if file.exists() else 0 for entry, file in files.items()}
    sizes = {entry: sum(file.stat().st_size for file in entry.rglob("*")) for entry in used}
    for entry in sorted(used, key=used.get):
        if sum(sizes.values()) <= limit * 10**9:
            return
        with suppress(Timeout, OSError), ExitStack() as locks:  # somebody makes, opens or uses it
            for lock in (f"{entry}.lock", *entry.glob("*.lock")):
                locks.enter_context(FileLock(lock, timeout=0))
            shutil.rmtree(entry)
            del sizes[entry]
