"""Step 6: the tokens of a run, to train and to evaluate on.

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
from dataclasses import dataclass
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
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from finetuning.cli.console import fail, first_line, is_main_process, progress_bar, say
from finetuning.preprocessing.encode import IGNORE_INDEX, Example, encode_together
from finetuning.preprocessing.files import DataError, find_files, hash_files
from finetuning.preprocessing.flags import DataArguments
from finetuning.preprocessing.rows import (
    Row,
    expected_answer,
    has_reasoning,
    learnt_answers,
    read_rows,
    task_of,
    without_reasoning,
)
from finetuning.preprocessing.summary import Summary, as_label, print_summary, summarize

SMALL = 8 * 2**20  # bytes of the files
BATCH_ROWS, BATCH_CHARACTERS = 500, 2**22  # that are tokenised at once, whichever is less
JSON = json.JSONEncoder(ensure_ascii=False, default=str)

# A row as JSON text, so that no type is guessed, and what the summary counts.
ROWS = Features({name: Value("string") for name in ("location", "row", "task", "label", "ignored")})
ROWS |= {"has_reasoning": Value("bool"), "is_empty": Value("bool")}
# An example in which something is supervised; `row_number` counts from 1 over all files.
TOKENS = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "length": Value("int32")})
TOKENS |= {"row_number": Value("int64"), "supervised": Value("int32"), "is_truncated": Value("bool")}

Record, Columns = dict[str, Any], dict[str, list[Any]]
PreprocessFunction = Callable[[Row, PreTrainedTokenizerBase], list[Example]]  # `common.preprocess_function`


@dataclass
class Data:
    """What a run trains or evaluates on: TOKENS, their summary and, if they are to be answered, the rows with texts."""

    dataset: Dataset
    summary: Summary
    rows: list[Row] | None = None


def load_training_data(
    args: DataArguments, function: PreprocessFunction, tokenizer: PreTrainedTokenizerBase, seed: int, needs_texts: bool
) -> tuple[Data, Data | None]:
    """The rows to train on and, if there are any, those to evaluate on: of files of their own, or a random share.

    Args:
        needs_texts: whether this process answers the rows to evaluate on.

    Raises:
        DataError: with the file, the row, the field and the remedy.
    """
    rows, train = read_data(args.data_path, args.max_rows, args, function, tokenizer)
    evaluation = None
    if args.eval_split:
        train.dataset, held_out, numbers = split_rows(train.dataset, len(rows), args.eval_split, seed)
        rows, evaluation = rows.select(numbers - 1), Data(held_out, train.summary)
    elif args.eval_data_path:
        rows, evaluation = read_data(args.eval_data_path, None, args, function, tokenizer)
    if evaluation and needs_texts:
        evaluation.rows = [json.loads(row) for row in rows["row"]]
    if PartialState().is_local_main_process:  # each machine may have a cache of its own
        remove_oldest(cache_folder(args), args.token_cache_gb)
    return train, evaluation


def split_rows(tokens: Dataset, count: int, share: float, seed: int) -> tuple[Dataset, Dataset, np.ndarray]:
    """Hold out a random share of `count` rows: the other rows' tokens, theirs, and their numbers in order."""
    if count < 2:
        raise DataError("--eval_split: there is only one row; leave the flag out")
    size = min(max(1, round(share * count)), count - 1)
    numbers = Dataset.from_dict({"row_number": np.arange(1, count + 1)})
    held_out = np.sort(numbers.train_test_split(size, seed=seed)["test"]["row_number"])
    is_held_out = np.isin(tokens.with_format("numpy")["row_number"][:], held_out)
    return tokens.select(np.flatnonzero(~is_held_out)), tokens.select(np.flatnonzero(is_held_out)), held_out


def read_data(
    data_path: str, max_rows: int | None, args: DataArguments, function: PreprocessFunction, tokenizer: Any
) -> tuple[Dataset, Data]:
    """Read, check and tokenise files, or find them in the cache, and print their summary; returns ROWS and tokens."""
    files = find_files(data_path)
    if len(files) > 1:
        say(f"{data_path}: {len(files)} files, from {files[0]} to {files[-1]}")
    (sha256,) = broadcast_object_list([hash_files(files) if is_main_process() else None])
    drop_reasoning = args.thinking == "off"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # our threads are enough, one for each batch

    def write(sinks: list[pa.NativeFile]) -> None:
        with progress_bar(f"reading {data_path}", "rows") as bar:
            rows = read_rows(data_path, files, args.rename, True, max_rows)
            records = (to_record(*row, drop_reasoning) for row in rows)
            encode = partial(function, tokenizer=tokenizer)
            tokenize = partial(tokenize_rows, function=encode, max_length=args.max_length)
            write_tables(records, tokenize, sinks, args.preprocessing_num_workers, bar)

    if sum(map(os.path.getsize, files)) > SMALL:
        entry = cache_folder(args) / make_key(sha256, files, max_rows, args, function, tokenizer)
        paths = [str(entry / "rows.arrow"), str(entry / "tokens.arrow")]
        get_or_create(entry, lambda: write([pa.OSFile(path, "wb") for path in paths]))
        rows, tokens = map(Dataset.from_file, paths)
    else:
        sinks = [pa.BufferOutputStream(), pa.BufferOutputStream()]
        write(sinks)
        rows, tokens = (Dataset.from_buffer(sink.getvalue()) for sink in sinks)
    summary = summarize(rows, tokens, data_path, sha256, drop_reasoning)
    print_summary(summary, args.max_length, tokenizer)
    return rows, Data(tokens, summary)


def to_record(location: str, row: Row, ignored: list[str], drop_reasoning: bool) -> Record:
    """One of ROWS."""
    counts = {"has_reasoning": has_reasoning(row), "is_empty": not all(map(str.strip, learnt_answers(row)))}
    counts |= {"task": task_of(row), "label": as_label(expected_answer(row)), "ignored": as_json(ignored)}
    return {"location": location, "row": as_json(without_reasoning(row) if drop_reasoning else row)} | counts


def as_json(value: Any) -> str:
    """JSON in valid UTF-8: an ignored field may hold half of a surrogate pair, for which its escape \\ud800 stands."""
    return JSON.encode(value).encode("utf-8", "backslashreplace").decode()


def write_tables(
    records: Iterator[Record], tokenize: Callable[..., Columns], sinks: list[Any], threads: int, bar: tqdm
) -> None:
    """Write ROWS and their TOKENS as Arrow streams, batch by batch.

    Threads tokenise while this one reads; a batch for each is in memory. `Dataset.map`, which begins after the last row
    is read, took longer: with two cores 1.5 times as long as the tokenizer alone, and this 1.2 times.
    """
    schemas = ROWS.arrow_schema, TOKENS.arrow_schema
    with ExitStack() as stack:
        streams = [stack.enter_context(sink) for sink in sinks]
        rows, tokens = (stack.enter_context(pa.ipc.new_stream(*pair)) for pair in zip(streams, schemas, strict=True))
        pool, pending, number = stack.enter_context(ThreadPoolExecutor(threads)), deque[Future](), 1
        for batch in split_into_batches(records):
            pending.append(pool.submit(tokenize, batch, number))
            rows.write_batch(pa.RecordBatch.from_pylist(batch, schemas[0]))
            number += len(batch)
            bar.update(len(batch))
            if len(pending) > threads:
                tokens.write_batch(pa.RecordBatch.from_pydict(pending.popleft().result(), schemas[1]))
        while pending:
            tokens.write_batch(pa.RecordBatch.from_pydict(pending.popleft().result(), schemas[1]))


def split_into_batches(records: Iterator[Record]) -> Iterator[list[Record]]:
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
    records: list[Record], number: int, function: Callable[[Row], list[Example]], max_length: int
) -> Columns:
    """TOKENS of ROWS that are counted from `number`. Longer examples lose their end, and with it the stop token."""
    examples: list[list[Example]] = []
    for record in records:
        try:
            examples.append(function(json.loads(record["row"])))
        except DataError as error:
            raise DataError(f"{record['location']}: {error}") from None
    encode_together(list(chain.from_iterable(examples)))
    tokens: Columns = {name: [] for name in TOKENS}
    for row_number, of_row in enumerate(examples, number):
        is_truncated = any(len(example["input_ids"]) > max_length for example in of_row)
        for example in of_row:
            input_ids, labels = example["input_ids"][:max_length], example["labels"][:max_length]
            supervised = len(labels) - labels.count(IGNORE_INDEX)
            values = (input_ids, labels, len(input_ids), row_number, supervised, is_truncated)
            for name, value in zip(TOKENS, values, strict=True) if supervised else ():
                tokens[name].append(value)
    return tokens


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


def get_or_create(entry: Path, create: Callable[[], None]) -> None:
    """Have `create` fill an entry, unless it is complete, and keep it in use. Other processes wait meanwhile."""
    complete = entry / "complete"
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{entry}.lock"):
            if complete.exists():
                say(f"tokens read from the cache: {entry}")
            else:
                shutil.rmtree(entry, ignore_errors=True)  # what a run that was killed has left
                entry.mkdir()
                try:
                    create()
                except BaseException:
                    shutil.rmtree(entry, ignore_errors=True)
                    raise
            complete.touch()  # the time of its last use
            IN_USE.append(FileLock(entry / f"{uuid4().hex}.lock"))
            IN_USE[-1].acquire()
    except OSError as error:
        message = f"the token cache in {entry.parent} cannot be written: {first_line(error)}."
        fail(f"{message}\nMake room there, or name another folder with --token_cache_dir", 1)


def remove_oldest(folder: Path, limit: float) -> None:
    """Remove the entries that were not used for longest, but none in use, until all have at most `limit` GB."""
    used = {path: path / "complete" for path in folder.glob("*") if path.is_dir()}
    used = {path: file.stat().st_mtime if file.exists() else 0 for path, file in used.items()}
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*")) for path in used}
    for path in sorted(used, key=used.get):
        if sum(sizes.values()) <= limit * 10**9:
            return
        with suppress(Timeout, OSError), ExitStack() as locks:  # somebody makes, opens or uses it
            for lock in (f"{path}.lock", *path.glob("*.lock")):
                locks.enter_context(FileLock(lock, timeout=0))
            shutil.rmtree(path)
            del sizes[path]
