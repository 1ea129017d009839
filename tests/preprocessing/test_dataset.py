"""dataset.py: small files in memory, large ones by several processes and through the cache; always the same tokens."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset
from filelock import FileLock
from pyarrow import parquet as pq
from support import CHATML, IM_END, REPOSITORY, THINKING, make_tokenizer, preprocess

from common import preprocess_function
from finetuning.cli import console
from finetuning.generation.labels import labels_of_tasks, warn_about_labels
from finetuning.preprocessing import dataset
from finetuning.preprocessing.dataset import load_training_data, make_key, remove_oldest, split_rows
from finetuning.preprocessing.encode import IGNORE_INDEX
from finetuning.preprocessing.files import DataError
from finetuning.preprocessing.flags import DataArguments

TURNS = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
ROWS = [{"instruction": f"Say {n}", "input": "now" * (n % 2), "output": f"w{n % 3}", "task": "say"} for n in range(20)]
ROWS[3] |= {"reasoning_content": "hm", "note": 1}
ROWS[7] = {"messages": TURNS}
ROWS[11] |= {"output": "long " * 300}
ROWS[13] |= {"instruction": "long " * 300}


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture
def large_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file counts as large, and is tokenised in several batches."""
    monkeypatch.setattr(dataset, "SMALL", 0)
    monkeypatch.setattr(dataset, "BATCH_ROWS", 3)


@pytest.fixture
def cache(tmp_path: Path, large_files: None) -> Any:
    """Calls `preprocess` with a token cache in a folder of the test's own."""

    def read(path: str, max_length: int = 200, **options: Any) -> dataset.Data:
        options = {"preprocessing_num_workers": 1, "token_cache_dir": str(tmp_path / "cache")} | options
        return preprocess(path, tokenizer_for(), max_length, **options)

    return read


def tokenizer_for(chat_template: str = THINKING) -> Any:
    return make_tokenizer("<|im_end|>", chat_template)


def entries(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def unused() -> None:
    """As after the end of the processes that used the entries."""
    while dataset.IN_USE:
        dataset.IN_USE.pop().release()


def test_large_files_give_the_same_tokens_as_small_ones(
    path: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the file's order, with the same counts; the second start reads them."""
    small = preprocess(path, tokenizer_for(), 200)
    printed = capsys.readouterr().out
    assert "20 rows (20 examples)" not in printed and "1 truncated at 200 tokens, 1 dropped" in printed
    assert small.summary.examples == small.summary.rows == len(small.read_rows()) == 20  # a conversation became two
    read = request.getfixturevalue("cache")
    for workers in (2, 1):
        large = read(path, preprocessing_num_workers=workers, token_cache_dir=str(tmp_path / "cache" / str(workers)))
        assert large.dataset.to_list() == small.dataset.to_list() and large.summary == small.summary
        assert capsys.readouterr().out == printed
    again = read(path, token_cache_dir=str(tmp_path / "cache" / "2"), preprocessing_num_workers=2)
    assert again.dataset.to_list() == small.dataset.to_list() and again.summary == small.summary
    assert f"tokens read from the cache: {tmp_path / 'cache' / '2'}" in capsys.readouterr().out


def test_what_changes_the_tokens_changes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale cache would train on yesterday's rows, format or code."""
    code = tmp_path / "edited.py"
    code.write_text("def preprocess_function(row, tokenizer): return []")
    monkeypatch.syspath_prepend(str(tmp_path))
    from edited import preprocess_function as edited  # noqa: I001 - written above

    other_words = tokenizer_for()
    other_words.add_tokens(["new"])
    args = {"sha256": "data", "files": ["a.csv"], "max_rows": None, "args": DataArguments()}
    args |= {"function": preprocess_function, "tokenizer": tokenizer_for()}
    changes = [
        {"sha256": "other data"},
        {"files": ["a.tsv"]},
        {"max_rows": 5},
        {"args": DataArguments(max_length=100)},
        {"args": DataArguments(thinking="off")},
        {"args": DataArguments(instruction_field="question")},
        {"tokenizer": tokenizer_for(THINKING + " ")},
        {"tokenizer": other_words},
        {"function": edited},
    ]
    keys = [make_key(**args | change) for change in [{}, *changes]]
    assert len(set(keys)) == len(keys) and make_key(**args | {"tokenizer": tokenizer_for()}) == keys[0]
    code.write_text(code.read_text() + "  # edited")
    assert make_key(**args | {"function": edited}) not in keys
    with_date = args | {"tokenizer": tokenizer_for(THINKING + "{{ strftime_now('%Y') }}")}
    today = make_key(**with_date)
    monkeypatch.setattr(dataset, "date", type("Tomorrow", (), {"today": lambda: "tomorrow"}))
    assert make_key(**with_date) != today and make_key(**args) == keys[0]


def test_the_cache_has_a_size_limit(path: str, tmp_path: Path, cache: Any) -> None:
    """The entries that were not used for the longest time go, whatever their number; those in use stay."""
    cache(path)
    (oldest,) = entries(tmp_path)
    size = sum(file.stat().st_size for file in oldest.rglob("*"))
    unused()
    os.utime(oldest / "examples.arrow", (1, 1))
    data = cache(path, 199, token_cache_gb=2.5 * size / 1e9)
    assert oldest in entries(tmp_path) and len(entries(tmp_path)) == 2
    cache(path)  # is used again
    unused()
    (other,) = set(entries(tmp_path)) - {oldest}
    os.utime(other / "examples.arrow", (2, 2))
    cache(path, 198, token_cache_gb=2.5 * size / 1e9)
    assert oldest in entries(tmp_path) and other not in entries(tmp_path)
    unused()
    cache(path, 197, token_cache_gb=0)
    assert len(entries(tmp_path)) == 1 and oldest not in entries(tmp_path)
    assert len(data.dataset[19]["input_ids"])  # an entry that is in use elsewhere can still be read


def test_an_entry_in_use_is_not_removed(path: str, tmp_path: Path, cache: Any) -> None:
    """Trap 109: neither one that another run makes or reads, nor the training tokens for the evaluation's."""
    evaluation = {"eval_data_path": path, "max_rows": 10, "token_cache_gb": 0}
    cache(path, **evaluation)
    assert len(entries(tmp_path)) == 2  # of this run: those to train and those to evaluate on
    unused()
    making, waiting, reading = tmp_path / "cache/making", *entries(tmp_path)
    (making / "half").mkdir(parents=True)
    with FileLock(f"{making}.lock"), FileLock(f"{waiting}.lock"), FileLock(reading / "somebody.lock"):
        remove_oldest(tmp_path / "cache", 0)
        assert {making, waiting, reading} == set(entries(tmp_path))
    remove_oldest(tmp_path / "cache", 0)  # also what a run that was killed has left
    assert not entries(tmp_path)


def test_an_entry_that_a_killed_run_left_is_made_again(path: str, tmp_path: Path, cache: Any, capsys: Any) -> None:
    first = cache(path).dataset.to_list()
    (entry,) = entries(tmp_path)
    (entry / "examples.arrow").rename(entry / "part")
    (entry / "part").write_bytes(b"half")
    capsys.readouterr()
    assert cache(path).dataset.to_list() == first and "from the cache" not in capsys.readouterr().out


def test_a_bad_row_stops_the_run_at_once(path: str, tmp_path: Path, cache: Any, capsys: Any) -> None:
    """Nothing half made is left. Rows after max_rows are not read."""
    with open(path, "a") as file:
        file.write('{"instruction": "a", "output": 5}\n')
    with pytest.raises(SystemExit) as stop:
        cache(path, preprocessing_num_workers=2)
    message = f"error: {path}: line 21: 'output' is the number 5, not text; write the word it stands for\n"
    assert stop.value.code == 2 and capsys.readouterr().err == message
    assert not entries(tmp_path)
    assert cache(path, max_rows=20, preprocessing_num_workers=2).summary.rows == 20


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_of_the_template_name_the_row(tmp_path: Path, cache: Any, capsys: Any, workers: int) -> None:
    """Qwen3.5's template refuses some texts of the user."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ROWS[0], ROWS[1] | {"instruction": "oh no"}]))
    template = CHATML + "{%- if 'oh no' in messages[-1].content %}{{ raise_exception('No query') }}{% endif %}"
    options = {"preprocessing_num_workers": workers, "token_cache_dir": str(tmp_path / "cache")}
    with pytest.raises(SystemExit):
        preprocess(str(path), tokenizer_for(template), 200, **options)
    assert f"{path}: row 2: the chat template cannot be rendered: No query" in capsys.readouterr().err


def test_several_files_count_on(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the order in which they are named."""
    Path(tmp_path / "more.json").write_text(json.dumps(ROWS[:2]))
    data = preprocess(f"{path},{tmp_path / 'more.json'}", tokenizer_for(), 200)
    printed = capsys.readouterr().out
    assert f"2 files, from {path} to {tmp_path / 'more.json'}\n" in printed
    assert ": ignored fields: note (1 rows)\n" in printed
    numbers = data.dataset["row_number"][:]
    assert data.summary.rows == 22 and numbers[:3] == [1, 2, 3] and numbers[-1] == 22


def test_splits_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trap 97: a cloned repository holds what is to be tested on, too. Words like latest name no split."""
    folder = tmp_path / "training-test"  # its own name does not count

    def read(*names: str) -> str:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(ROWS[:1]))
        preprocess(str(folder), tokenizer_for(), 200)
        return capsys.readouterr().err

    assert read("data/train-0.json", "data/train-1.json", "latest.json", "testimony.json") == ""
    assert f"{folder} holds several splits (train, validation), and all files are read" in read("validation/0.json")
    folder = tmp_path / "others"
    assert f"{folder} holds several splits (test), and all files are read" in read("rows.json", "rows_test.json")


def test_others_wait_for_the_first(path: str, tmp_path: Path, cache: Any, monkeypatch: Any, capsys: Any) -> None:
    """Of several processes that train together one makes the entry; it is looked for again after the wait."""
    cache(path)
    (entry,) = entries(tmp_path)
    monkeypatch.setattr(dataset, "FileLock", lambda path: FileLock(path, timeout=0))  # would wait: says so instead
    with FileLock(f"{entry}.lock"), pytest.raises(SystemExit):
        cache(path)
    assert f"{entry}.lock' could not be acquired" in capsys.readouterr().err
    assert len(cache(path).dataset) == 20 and f"tokens read from the cache: {entry}" in capsys.readouterr().out


def test_two_processes_make_one_entry(path: str, tmp_path: Path) -> None:
    """Both start together, and only one of them tokenises."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from support import preprocess\n"
        "from test_dataset import tokenizer_for\n"
        "from finetuning.preprocessing import dataset\n"
        "dataset.SMALL = 0\n"
        "data = preprocess(sys.argv[1], tokenizer_for(), 200, token_cache_dir=sys.argv[2])\n"
        "print(len(data.dataset))\n"
    )
    folders = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests/preprocessing")]
    options = {"stdout": subprocess.PIPE, "env": os.environ | {"PYTHONPATH": os.pathsep.join(folders)}}
    command = [sys.executable, str(script), path, str(tmp_path / "cache")]
    both = [subprocess.Popen(command, encoding="utf-8", **options) for _ in range(2)]
    printed = [process.communicate()[0] for process in both]
    assert [text.splitlines()[-1] for text in printed] == ["20", "20"] and len(entries(tmp_path)) == 1
    assert sum("tokens read from the cache" in text for text in printed) == 1


def test_a_bar_that_is_drawn(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """tqdm's `update` returns True each time, as in the minute-long reading of a large file."""
    rows: list[int] = []
    bar = SimpleNamespace(update=lambda count: rows.append(count) or True)
    monkeypatch.setattr(dataset, "progress_bar", lambda *args: nullcontext(bar))
    assert preprocess(path, tokenizer_for(), 200).summary.rows == 20 == sum(rows)


def test_a_batch_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long rows go through the tokenizer a few at a time."""
    sizes: list[int] = []
    tokenize = dataset.tokenize_rows
    monkeypatch.setattr(
        dataset, "tokenize_rows", lambda rows, *a, **k: sizes.append(len(rows)) or tokenize(rows, *a, **k)
    )
    monkeypatch.setattr(dataset, "BATCH_CHARACTERS", 100_000)
    for length, most in ((10_000, 10), (10, 500)):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps([{"instruction": "a" * length, "output": "b"}] * 600))
        sizes.clear()
        preprocess(str(path), tokenizer_for(), 20_000)
        assert sum(sizes) == 600 and max(sizes) <= most and max(sizes) > most // 2


def test_half_of_a_surrogate_pair(tmp_path: Path) -> None:
    """No text can hold it, but an ignored field or its name may, and a task."""
    path = tmp_path / "rows.json"
    path.write_text('[{"instruction": "a", "output": "b", "note": "\\ud83d", "\\ud83d": 1, "task": "\\ud83d"}]')
    data = preprocess(str(path), tokenizer_for(), 200)
    assert len(data.dataset) == 1 and list(data.summary.ignored.values()) == [1, 1]


def test_a_full_disk(path: str, tmp_path: Path, cache: Any, monkeypatch: Any, capsys: Any) -> None:
    def write(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset, "write_table", write)
    with pytest.raises(SystemExit) as stop:
        cache(path)
    assert stop.value.code == 1 and not entries(tmp_path)
    message = capsys.readouterr().err
    assert "No space left on device" in message and "--token_cache_dir" in message and len(message.splitlines()) == 2


# ---- counts


def test_counts_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kept, truncated and dropped add up, and empty and blank answers of conversations count too."""
    answer = {"role": "assistant", "content": "a long answer"}
    rows = [{"messages": [TURNS[0], answer, TURNS[0], answer]}, {"messages": [TURNS[0], answer | {"content": " "}]}]
    rows += [{"instruction": "a", "output": ""}, {"instruction": "b" * 400, "output": "c"}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    whole = preprocess(str(path), tokenizer_for(CHATML), 1000)
    assert whole.summary.kept == 4 and whole.summary.empty == 2
    assert "2 rows have an empty answer" in capsys.readouterr().out
    length = whole.dataset[0]["input_ids"].index(IM_END, whole.dataset[0]["input_ids"].index(ord("l"))) + 1
    assert whole.dataset[0]["input_ids"][:length][-1] == IM_END  # cut right after an earlier stop token
    summary = preprocess(str(path), tokenizer_for(CHATML), length).summary
    assert (summary.kept, summary.truncated, summary.dropped, summary.rows) == (2, 1, 1, 4)
    path.write_text(json.dumps([{"instruction": "a", "output": "b", "history": [["c", ""]]}]))
    assert preprocess(str(path), tokenizer_for(CHATML), 1000).summary.empty == 1


def test_masked_answers_count_as_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their reasoning is not supervised, they are no label words, and a row with nothing else is not too long."""
    masked = [TURNS[0], {"role": "assistant", "content": "BAD", "reasoning_content": "hm", "weight": 0}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"messages": [*TURNS, *masked]}] * 3 + [{"messages": masked}] + ROWS[:1]))
    summary = preprocess(str(path), tokenizer_for(CHATML), 1000).summary
    assert (summary.rows, summary.kept, summary.truncated, summary.dropped, summary.masked) == (5, 4, 0, 0, 1)
    assert summary.reasoning == 0
    assert "1 rows have no answer to learn: all of theirs have weight 0" in capsys.readouterr().out
    length = len(preprocess(str(path), tokenizer_for(CHATML), 1000).dataset[0]["labels"])
    assert preprocess(str(path), tokenizer_for(CHATML), length - 5).summary.truncated == 0  # only of what is masked
    words = [{"messages": [*TURNS, TURNS[0], masked[1] | {"content": ("good", "bad")[n % 2]}]} for n in range(300)]
    path.write_text(json.dumps(words))
    assert not labels_of_tasks(preprocess(str(path), tokenizer_for(CHATML), 1000).summary)
    path.write_text(json.dumps([{"messages": masked}]))
    with pytest.raises(SystemExit):
        preprocess(str(path), tokenizer_for(CHATML), 1000)
    assert capsys.readouterr().err.endswith("no row is left\n")


def test_an_odd_answer_among_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One empty or long answer does not take a task's label words away, and it is named."""
    rows = [{"instruction": "a", "output": ("good", "bad")[n % 2], "task": "mood"} for n in range(300)]
    for odd in ("", "x" * 41, "two\nlines"):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps([*rows, {"instruction": "a", "output": odd, "task": "mood"}]))
        summary = preprocess(str(path), tokenizer_for(), 200).summary
        assert labels_of_tasks(summary) == {"mood": ["good", "bad"]}
        warn_about_labels(summary)
        assert "the answer in row 301 is empty or long" in capsys.readouterr().err
    path.write_text(json.dumps([*rows[:20], {"instruction": "a", "output": "", "task": "mood"}]))
    assert not labels_of_tasks(preprocess(str(path), tokenizer_for(), 200).summary)


# ---- rows to evaluate on


def load(path: str, tmp_path: Path, **options: Any) -> tuple[dataset.Data, dataset.Data | None]:
    args = DataArguments(data_path=path, token_cache_dir=str(tmp_path / "cache"), **options)
    return load_training_data(args, preprocess_function, tokenizer_for(), 1)


def test_held_out_rows() -> None:
    """All examples of a row go together, each seed has its own share, and nothing is in both."""
    table = Dataset.from_dict({"row_number": [number for number in range(1, 101) for _ in range(1 + number % 3)]})
    table = table.add_column("length", [5] * len(table))
    rest, held_out = split_rows(table, 0.2, 0)
    numbers = list(held_out["row_number"])
    assert len(set(numbers)) == 20 and numbers == sorted(numbers)
    assert not set(rest["row_number"]) & set(numbers) and len(rest) + len(held_out) == len(table)
    again, other = (list(split_rows(table, 0.2, seed)[1]["row_number"]) for seed in (0, 1))
    assert again == numbers != other
    for share, count in ((0.001, 1), (0.999, 99)):
        assert len(set(split_rows(table, share, 0)[1]["row_number"])) == count
    with pytest.raises(DataError, match="there is only one row"):
        split_rows(table.select([0]), 0.5, 0)


def test_rows_that_are_dropped_are_not_held_out(tmp_path: Path) -> None:
    """An evaluation of nothing would divide by zero after the training."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": ("a", "long " * 300)[n % 2], "output": "b"} for n in range(6)]))
    for seed in range(5):
        args = DataArguments(data_path=str(path), eval_split=0.4, max_length=200)
        train, evaluation = load_training_data(args, preprocess_function, tokenizer_for(), seed)
        assert (len(train.dataset), len(evaluation.dataset)) == (2, 1)
    path.write_text(json.dumps([{"instruction": "a", "output": "b"}, {"instruction": "long " * 300, "output": "b"}]))
    with pytest.raises(DataError, match="there is only one row"):
        load_training_data(args, preprocess_function, tokenizer_for(), 1)


@pytest.mark.parametrize("size", [0, 8 * 2**20], ids=["large", "small"])
def test_texts_of_held_out_rows(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """They belong to the tokens, and to the answers that are compared."""
    monkeypatch.setattr(dataset, "SMALL", size)
    train, evaluation = load(path, tmp_path, eval_split=0.3, max_length=4000)
    assert len(evaluation.read_rows()) == 6 and not set(train.dataset["row_number"]) & set(
        evaluation.dataset["row_number"]
    )
    texts = {text.decode() for text in map(bytes, supervised(evaluation.dataset))}
    assert texts <= {(row.get("output") or "") for row in evaluation.read_rows()} | set("bd")


def supervised(examples: Dataset) -> list[list[int]]:
    """The bytes of the answers, without their stop tokens and reasoning."""
    found = [[id for id in example["labels"] if id not in (IGNORE_INDEX, IM_END)] for example in examples]
    return [[id for id in ids if id < 256] for ids in found]


def test_eval_split_reads_rows_once(tmp_path: Path) -> None:
    """Trap 109: a field that few rows have may be named, and nothing is read beyond --max_rows."""
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"q{n}", "answer": "a"} | ({"context": "c"} if n == 50 else {}) for n in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"instruction_field": "question", "output_field": "answer", "input_field": "context"}
    for share in (0.02, 0.1):
        train, evaluation = load(str(path), tmp_path, eval_split=share, **names)
        assert train.summary.rows == 100 and len(evaluation.read_rows()) == round(100 * share)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:20]) + "{broken\n")
    del names["input_field"]
    train, evaluation = load(str(path), tmp_path, eval_split=0.1, max_rows=20, **names)
    assert len(train.dataset) == 18 and len(evaluation.read_rows()) == 2
    with pytest.raises(DataError, match="line 21"):
        load(str(path), tmp_path, **names)


def test_a_field_beyond_max_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ROWS[0] | {"input": None}] * 3 + [{"instruction": "a", "output": "b", "context": "c"}]))
    load(str(path), tmp_path, input_field="context", max_rows=2)
    assert "no row has the field 'context', which --input_field names, among the first 2" in capsys.readouterr().err
    load(str(path), tmp_path, input_field="context")
    with pytest.raises(DataError, match="no row has the field 'contxt'"):
        load(str(path), tmp_path, input_field="contxt")
    with pytest.raises(DataError, match="no row has the field 'contxt'"):
        load(str(path), tmp_path, input_field="contxt", max_rows=5)  # which the file does not have


def test_a_parquet_column_that_is_null_throughout(tmp_path: Path) -> None:
    """It is there, as it is in JSON."""
    columns = {"instruction": ["a", "b"], "output": ["c", "d"], "context": pa.nulls(2, pa.string())}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    assert load(str(tmp_path / "rows.parquet"), tmp_path, input_field="context")[0].summary.rows == 2


def test_the_main_process_hashes_for_all(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others get the hash from it."""
    hashed: list[list[str]] = []
    monkeypatch.setattr(dataset, "hash_files", lambda files: hashed.append(files) or "sha")
    monkeypatch.setattr(dataset, "is_main_process", lambda: False)
    monkeypatch.setattr(dataset, "broadcast_object_list", lambda values: ["sent"])
    assert preprocess(path, tokenizer_for(), 200).summary.sha256 == "sent" and not hashed
    assert console.is_main_process()
