"""From files to tokens: in batches, by several processes, through the cache; always the same tokens."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pyarrow as pa
import pytest
from datasets import Dataset
from support import REPOSITORY, THINKING, make_tokenizer, preprocess

from common import preprocess_function
from finetuning.preprocessing import token_cache, token_dataset
from finetuning.preprocessing.label_words import AnswerCounts, find_labels
from finetuning.preprocessing.summary import Summary
from finetuning.preprocessing.token_cache import TOKENS, TokenCache
from finetuning.preprocessing.token_dataset import ChunkTokenizer, make_key, map_in_order, split_rows

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
    """Every file counts as large, and has several chunks."""
    monkeypatch.setattr(token_dataset, "SMALL", 0)
    monkeypatch.setattr(token_dataset, "CHUNK", 3)


def tokenizer_for(chat_template: str = THINKING) -> Any:
    return make_tokenizer("<|im_end|>", chat_template)


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


def test_a_batch_is_tokenised_as_its_rows_are(path: str) -> None:
    tokenizer = tokenizer_for()
    rows = [{"instruction": text, "output": text * 2} for text in ["a", "a", "", "<|im_end|>", "\n\n", "<|im_start|>a"]]
    batch = preprocess_function(rows, tokenizer, 100)
    assert batch == [preprocess_function([row], tokenizer, 100)[0] for row in rows] and batch[0] == batch[1]


def test_large_files_give_the_same_tokens_as_small_ones(
    path: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the file's order, with the same counts; the second start reads them."""
    tokenizer, folder = tokenizer_for(), tmp_path / "cache"
    small = preprocess(path, tokenizer, 200)
    printed = capsys.readouterr().out
    assert "20 rows (20 examples)" not in printed and "1 cut at 200 tokens, 1 dropped" in printed
    assert small.summary.examples == 20  # a conversation became two
    request.getfixturevalue("large_files")
    for workers in (2, 1):
        large = preprocess(path, tokenizer, 200, num_workers=workers, cache=TokenCache(str(folder / str(workers)), 1))
        assert large.dataset.to_list() == small.dataset.to_list() and large.summary == small.summary
        assert capsys.readouterr().out == printed
    again = preprocess(path, tokenizer, 200, cache=TokenCache(str(folder / "1"), 1))
    assert again.dataset.to_list() == small.dataset.to_list() and again.summary == small.summary
    assert f"tokens read from the cache: {folder / '1'}" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["flip", "cut", "no summary", "half a summary"])
def test_a_damaged_cache_is_made_again(
    damage: str, path: str, tmp_path: Path, large_files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = TokenCache(str(tmp_path / "cache"), 1)
    first = preprocess(path, tokenizer_for(), 200, num_workers=1, cache=cache).dataset.to_list()
    (entry,) = entries(cache.folder)
    tokens, summary = entry / TOKENS, entry / "summary.json"
    data = bytearray(tokens.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "flip":
        tokens.write_bytes(data)
    elif damage == "cut":
        tokens.write_bytes(data[:-100])
    elif damage == "no summary":
        summary.unlink()
    else:
        summary.write_text(summary.read_text()[:20])
    again = preprocess(path, tokenizer_for(), 200, num_workers=1, cache=cache).dataset.to_list()
    assert again == first and "from the cache" not in capsys.readouterr().out
    preprocess(path, tokenizer_for(), 200, num_workers=1, cache=cache)
    assert "from the cache" in capsys.readouterr().out and entries(cache.folder) == [entry]


def test_what_changes_the_tokens_changes_the_key(tmp_path: Path) -> None:
    """A stale cache would train on yesterday's rows, format or code."""
    code = tmp_path / "edited.py"
    code.write_text("def preprocess_function(rows, tokenizer, max_length): return rows")
    sys.path.insert(0, str(tmp_path))
    from edited import preprocess_function as edited  # noqa: I001 - written above

    other_words = tokenizer_for()
    other_words.add_tokens(["new"])
    plain = ChunkTokenizer(preprocess_function, tokenizer_for(), 200)
    others = [
        ("other data", None, plain),
        ("data", 5, plain),
        ("data", None, ChunkTokenizer(preprocess_function, tokenizer_for(), 100)),
        ("data", None, ChunkTokenizer(preprocess_function, tokenizer_for(), 200, "off")),
        ("data", None, ChunkTokenizer(preprocess_function, tokenizer_for(), 200, rename={"question": "instruction"})),
        ("data", None, ChunkTokenizer(preprocess_function, tokenizer_for(THINKING + " "), 200)),
        ("data", None, ChunkTokenizer(preprocess_function, other_words, 200)),
        ("data", None, ChunkTokenizer(edited, tokenizer_for(), 200)),
    ]
    keys = [make_key(*arguments) for arguments in [("data", None, plain), *others]]
    assert len(set(keys)) == len(keys)
    assert make_key("data", None, ChunkTokenizer(preprocess_function, tokenizer_for(), 200)) == keys[0]
    code.write_text(code.read_text() + "  # edited")
    assert make_key(*others[-1]) not in keys
    sys.path.remove(str(tmp_path))


def test_the_cache_has_a_size_limit(path: str, tmp_path: Path, large_files: None) -> None:
    """The entries that were not used for the longest time go; the one in use stays, whatever its size."""
    folder = tmp_path / "cache"
    preprocess(path, tokenizer_for(), 200, num_workers=1, cache=TokenCache(str(folder), 1))
    (oldest,) = entries(folder)
    size = sum(file.stat().st_size for file in oldest.iterdir())
    os.utime(oldest, (1, 1))
    data = preprocess(path, tokenizer_for(), 199, num_workers=1, cache=TokenCache(str(folder), 2.5 * size / 1e9))
    assert oldest in entries(folder) and len(entries(folder)) == 2
    preprocess(path, tokenizer_for(), 200, num_workers=1, cache=TokenCache(str(folder), 1))  # is used again
    (unused,) = set(entries(folder)) - {oldest}
    os.utime(unused, (2, 2))
    preprocess(path, tokenizer_for(), 198, num_workers=1, cache=TokenCache(str(folder), 2.5 * size / 1e9))
    assert oldest in entries(folder) and unused not in entries(folder)
    preprocess(path, tokenizer_for(), 197, num_workers=1, cache=TokenCache(str(folder), 0))
    assert len(entries(folder)) == 1 and oldest not in entries(folder)
    assert len(data.dataset[19]["input_ids"])  # an entry that is in use elsewhere can still be read


def test_a_bad_row_is_named_by_whoever_finds_it(
    path: str, tmp_path: Path, large_files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing half made is left in the cache. Rows after max_rows are not read."""
    with open(path, "a") as file:
        file.write('{"instruction": "a", "output": 5}\n')
    cache = TokenCache(str(tmp_path / "cache"), 1)
    with pytest.raises(SystemExit) as stop:
        preprocess(path, tokenizer_for(), 200, num_workers=2, cache=cache)
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {path}: line 21: 'output' is the number 5, " + (
        "not text; put it in quotes\n"
    )
    assert not entries(cache.folder)
    assert preprocess(path, tokenizer_for(), 200, max_rows=20, num_workers=2, cache=cache).summary.rows == 20


def test_several_files_count_on(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(tmp_path / "more.json").write_text(json.dumps(ROWS[:2]))
    data = preprocess(f"{path},{tmp_path / 'more.json'}", tokenizer_for(), 200)
    printed = capsys.readouterr().out
    assert f"2 files, from {tmp_path / 'more.json'} to {path}\n" in printed and ": not read: note (1 rows)\n" in printed
    numbers = data.dataset["row_number"][:]
    assert data.summary.rows == 22 and numbers[:3] == [1, 2, 3] and numbers[-1] == 22


def test_a_process_that_is_killed(path: str, large_files: None, tmp_path: Path, capsys: Any) -> None:
    parent = os.getpid()

    def kill(rows: list[Any], *others: Any) -> list[Any]:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return preprocess_function(rows, *others)

    with pytest.raises(SystemExit) as stop:
        token_dataset.make_dataset(path, ChunkTokenizer(kill, tokenizer_for(), 200), num_workers=2)
    assert stop.value.code == 1 and "was killed, perhaps for want of memory; try --pre" in capsys.readouterr().err


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    """A parent that is killed cannot tell them."""
    script = tmp_path / "run.py"
    script.write_text(
        "import time\n"
        "from finetuning.preprocessing.token_dataset import map_in_order\n"
        "def wait(chunk):\n"
        "    print('ready' if chunk else '', flush=True)\n"
        "    time.sleep(0 if chunk == 0 else 60)\n"
        "list(map_in_order(wait, iter(range(9)), 2))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment) as process:
        while process.stdout.readline() != b"ready\n":
            pass
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 2
        process.kill()
        assert not psutil.wait_procs(children, timeout=30)[1]


def test_few_chunks_are_held() -> None:
    """Reading never runs far ahead of writing, so memory does not grow with the file."""
    taken: list[int] = []

    def chunks() -> Iterator[Any]:
        for number in range(40):
            taken.append(number)
            yield number

    for done, result in enumerate(map_in_order(abs, chunks(), 2), 1):
        assert result == done - 1 and len(taken) <= done + 5


def test_others_wait_for_the_maker(
    path: str, tmp_path: Path, large_files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of several processes that train together, one makes the entry."""
    found: list[Dataset] = []
    tokenizer, folder = tokenizer_for(), str(tmp_path / "cache")
    others = TokenCache(folder, 1, is_maker=False)
    waiting = Thread(target=lambda: found.append(preprocess(path, tokenizer, 200, cache=others).dataset))
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive() and not Path(folder).exists()
    made = preprocess(path, tokenizer_for(), 200, num_workers=1, cache=TokenCache(folder, 1)).dataset
    waiting.join(timeout=60)
    assert found[0].to_list() == made.to_list() and "read from the cache" not in capsys.readouterr().out


def test_a_full_disk(
    path: str, tmp_path: Path, large_files: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(folder: Path, make: Any) -> None:
        (folder / TOKENS).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache, "write_entry", write)
    with pytest.raises(SystemExit) as stop:
        preprocess(path, tokenizer_for(), 200, num_workers=1, cache=TokenCache(str(tmp_path / "cache"), 1))
    assert stop.value.code == 1 and not entries(tmp_path / "cache")
    message = capsys.readouterr().err
    assert "No space left on device" in message and "--token_cache_dir" in message and len(message.splitlines()) == 2


def test_held_out_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """All examples of a row go together, each seed has its own share, and nothing is in both."""
    numbers = [number for number in range(1, 101) for _ in range(1 + number % 3)]
    dataset = Dataset(pa.table({"row_number": numbers}))
    rest, held_out = (set(part["row_number"]) for part in split_rows(dataset, 0.2, 0))
    assert len(held_out) == 20 and rest | held_out == set(numbers) and not rest & held_out
    assert sum(map(len, split_rows(dataset, 0.2, 0))) == len(numbers)
    assert (
        set(split_rows(dataset, 0.2, 0)[1]["row_number"])
        == held_out
        != set(split_rows(dataset, 0.2, 1)[1]["row_number"])
    )
    assert [len(set(part["row_number"])) for part in split_rows(dataset, 0.001, 0)] == [99, 1]
    with pytest.raises(SystemExit):
        split_rows(dataset.select([0]), 0.5, 0)
    assert "there is only one row" in capsys.readouterr().err


@pytest.mark.parametrize(
    "answers", [["a", "b"] * 9, ["a", "b"] * 2, ["a", "b", ""] * 9, ["a" * 41, "b"] * 9, ["c"] * 9]
)
def test_label_words_are_counted_in_parts(answers: list[str]) -> None:
    together = AnswerCounts()
    for start in range(0, len(answers), 4):
        part = AnswerCounts()
        for answer in answers[start : start + 4]:
            part.add(answer)
        together.merge(part)
    assert together.labels() == find_labels(answers) and together.count == len(answers)


def test_many_different_answers_are_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are forgotten, so that memory does not grow with the file."""
    monkeypatch.setattr("finetuning.preprocessing.label_words.MOST_COUNTED", 3)
    summary, part = Summary(), Summary()
    for number in range(12):
        part.add_row({"instruction": "a", "output": f"w{number % 4}"})
    summary.add(part)
    assert summary.labels() == {"rows": ["w0", "w1", "w2", "w3"]}
    summary.add(part)
    assert summary.tasks["rows"].words is None and not summary.labels()
