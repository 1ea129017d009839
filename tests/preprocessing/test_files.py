"""files.py: every form of a data file gives the same rows, streamed, and what is damaged is named."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import os
import re
import tracemalloc
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from support import make_tokenizer, preprocess, read_all

import inference
from finetuning.preprocessing import files, readers
from finetuning.preprocessing.files import DataError, find_files, hash_files
from finetuning.preprocessing.readers import read_file
from finetuning.preprocessing.rows import read_rows, rename_fields
from finetuning.preprocessing.templates import set_prompt_format

ROWS = [
    {"instruction": "翻译为英文", "input": "你好", "output": "Hello, world"},
    {"instruction": 'Say "a, b"\tand\n\nmore', "input": "", "output": "2024-01-01"},
    {"instruction": "a\u2028b\u0085c\x1e", "input": "007", "output": " true ", "task": "x"},
]
TURNS = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "b"}]


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_table(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    """A CSV file; lists are JSON text."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        writer.writerow({name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()})
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in names}), sink)
    return sink.getvalue().to_pybytes()


def compress(data: bytes, ending: str) -> bytes:
    if ending in ("gz", "bz2"):
        return {"gz": gzip, "bz2": bz2}[ending].compress(data)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


# The bytes of a file that holds some rows, by its ending.
FORMS: dict[str, Callable[[list[Any]], bytes]] = {
    "json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=1).encode(),
    "jsonl": as_lines,
    "csv": as_table,
    "tsv": lambda rows: as_table(rows, "\t"),
}
FORMS |= {
    f"{form}.{ending}": lambda rows, write=write, ending=ending: compress(write(rows), ending)
    for form, write in FORMS.items()
    for ending in ("gz", "zst", "bz2")
} | {"parquet": as_parquet}


def refused(capsys: pytest.CaptureFixture[str], function: Callable, *args: Any, **kwargs: Any) -> str:
    """The line with which a call ends the program."""
    with pytest.raises(SystemExit) as stop:
        function(*args, **kwargs)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("error: ") and len(message.splitlines()) == 1, message
    return message


def read_file_of(path: str) -> Any:
    return read_file(path, ())


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def numbered(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"instruction": f"row {start + number}", "input": "", "output": "b"} for number in range(count)]


# ---- every form


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(tmp_path: Path, form: str) -> None:
    expected = read_all(write(tmp_path / "rows.json", json.dumps(ROWS)))
    assert read_all(write(tmp_path / f"rows.{form}", FORMS[form](ROWS))) == expected


@pytest.mark.parametrize("form", FORMS)
def test_conversations_in_every_form(tmp_path: Path, form: str) -> None:
    """Trap 71: a table holds them as JSON text; a Parquet file also as columns, where what is not there is null."""
    rows = [{"messages": TURNS}, {"messages": [*TURNS, TURNS[0], TURNS[1] | {"weight": 0}], "task": "x"}]
    assert read_all(write(tmp_path / f"rows.{form}", FORMS[form](rows))) == rows
    history = [{"instruction": "a", "input": "", "output": "b", "history": [["c", "d"]]}]
    assert read_all(write(tmp_path / f"history.{form}", FORMS[form](history))) == history


def test_places(tmp_path: Path) -> None:
    """What an error message names: the row of a list, the line of a text, where a row of several lines begins."""
    table = 'instruction,output\n"a\nb",c\n\n,,\nd,"e\r\nf"\n'.replace(",,", ",")
    assert list(read_file_of(write(tmp_path / "a.csv", table))) == [
        ("line 2", {"instruction": "a\nb", "output": "c"}),
        ("line 6", {"instruction": "d", "output": "e\r\nf"}),
    ]
    assert [place for place, _ in read_file_of(write(tmp_path / "a.json", "[1,\n2]"))] == ["row 1", "row 2"]
    assert [place for place, _ in read_file_of(write(tmp_path / "a.jsonl", "1\n\n2"))] == ["line 1", "line 3"]
    assert list(read_file_of(write(tmp_path / "b.jsonl", '\n{"a":\n1}'))) == [("the file", {"a": 1})]


def test_content_counts_before_the_ending(tmp_path: Path) -> None:
    lines, table = FORMS["jsonl"](ROWS), FORMS["csv"](ROWS)
    for name, content in {
        "lines.json": lines,
        "list.jsonl": FORMS["json"](ROWS),
        "lines.csv": lines,
        "plain.json.gz": FORMS["json"](ROWS),
        "compressed.json": compress(lines, "zst"),
        "parquet.json": FORMS["parquet"](ROWS),
        "TABLE.CSV": table,
        "table.csv": b"\xef\xbb\xbf" + table,
        "two.csv.gz": gzip.compress(table[:50]) + gzip.compress(table[50:]),
        "windows.csv": b"\xef\xbb\xbf"
        + FORMS["csv"]([row | {"instruction": "a"} for row in ROWS]).replace(b"\n", b"\r\n"),
    }.items():
        found = read_all(write(tmp_path / name, content))
        assert [row["output"] for row in found] == [row["output"] for row in ROWS], name


def test_values_of_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write(tmp_path / "a.csv", ",instruction,output,task,system,history\n0,5,,,,\n")
    (row,) = read_all(table)
    assert row == {"column 1": "0", "instruction": "5", "input": "", "output": ""}  # text, and nothing where nothing is
    parquet_rows = [{"instruction": "a", "output": 5}, {"instruction": "a", "output": date(2024, 1, 1)}]
    for row, words in zip(parquet_rows, ("the number 5, not text", "of the type date, not text"), strict=True):
        path = write(tmp_path / "a.parquet", FORMS["parquet"]([row]))
        assert f"{path}: row 1: 'output' is {words}" in refused(capsys, read_all, path)
    # columns that mean nothing here: dates are text, also those that Python does not have; lists and bytes are not read
    columns = {"instruction": ["a"], "output": ["b"], "day": [datetime(2024, 1, 1)], "score": [0.5]}
    columns |= {"late": pyarrow.array([2**60], pyarrow.timestamp("ms")), "vector": [[0.1, 0.2]], "raw": [b"\xff"]}
    columns["lates"] = pyarrow.array([[2**60]], pyarrow.list_(pyarrow.timestamp("ms")))  # to read them would fail
    parquet.write_table(pyarrow.table(columns), tmp_path / "c.parquet")
    ((_, row, ignored),) = read_rows("c", [str(tmp_path / "c.parquet")], {}, True)
    assert row.pop("late") and row.pop("day").startswith("2024-01-01")
    assert row == {"instruction": "a", "input": "", "output": "b", "score": 0.5}
    assert ignored == ["day", "score", "late", "vector", "raw", "lates"]
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["instruction", "output", "output"])
    parquet.write_table(table, tmp_path / "b.parquet")
    assert "two columns have the same name" in refused(capsys, read_all, str(tmp_path / "b.parquet"))


def test_line_of_a_bad_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also a character that is cut at the end. The rows before it are read."""
    good = "\ufeffinstruction,output\n" + "a,你好\n" * 300
    for bad in (b"a,\xff\n", "a,你".encode()[:-1], "a,你".encode()[:-1] + b"\n"):
        path = write(tmp_path / "rows.csv", good.encode() + bad)
        assert f"{path}: line 302: is not UTF-8" in refused(capsys, read_all, path)
        rows = read_file_of(path)
        assert [next(rows)[0] for _ in range(300)][-1] == "line 301"
    row = {"instruction": "a", "output": "b"}
    path = write(
        tmp_path / "rows.json", f"[{json.dumps(row)},\n{json.dumps(row)},\n".encode() + b'{"instruction": "\xff"}]'
    )
    rows = read_file_of(path)
    assert [next(rows), next(rows)] == [("row 1", row), ("row 2", row)]
    assert f"{path}: line 3: is not UTF-8" in refused(capsys, read_all, path)


# ---- which files


def test_find_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [
        "data/part-10.json",
        "data/part-2.json",
        "data/sub/part-1.csv.gz",
        "data/a.parquet",
        "a,b.json",
        "x[1].json",
    ]
    for name in [*names, "data/.hidden.json", "data/.git/a.json", "data/README.md", "data/_SUCCESS"]:
        write(Path(name), FORMS["json"](ROWS))
    ordered = ["data/a.parquet", "data/part-2.json", "data/part-10.json", "data/sub/part-1.csv.gz"]
    ordered = [str(Path(name)) for name in ordered]
    assert find_files("data") == find_files("./data/") == find_files("dat?") == ordered
    with monkeypatch.context() as inside:
        inside.chdir("data")
        assert find_files(".") == find_files("./") == [os.path.relpath(file, "data") for file in ordered]
    assert find_files("data/") == find_files("data/**/") == ordered
    assert find_files("data/part-*.json") == ordered[1:3]
    assert find_files("data/**/*.gz") == ordered[3:]
    assert find_files("./data/part-2.json, data/*.json,data/part-2.json,") == ordered[1:3]
    assert find_files("a,b.json") == ["a,b.json"] and find_files("x[1].json") == ["x[1].json"]
    assert find_files("data/_SUCCESS") == ["data/_SUCCESS"]  # named, so it is read


def test_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own; within a folder a natural one that does not depend on the file system."""
    monkeypatch.chdir(tmp_path)
    for name in ("part-1.json", "part-01.json", "b.json", "a.json"):
        write(Path("data", name), FORMS["json"](ROWS))
    monkeypatch.setattr(Path, "rglob", lambda self, _: sorted(self.glob("*"), reverse=True))
    found = [Path(file).name for file in find_files("data")]
    monkeypatch.setattr(Path, "rglob", lambda self, _: sorted(self.glob("*")))
    assert (
        found == [Path(file).name for file in find_files("data")] == ["a.json", "b.json", "part-01.json", "part-1.json"]
    )
    assert find_files("data/b.json,data/a.json") == ["data/b.json", "data/a.json"]


def test_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "data/README.md", "")
    write(tmp_path / "a.json", "[]")
    os.mkfifo(tmp_path / "pipe")
    for path, words in {
        "": "does not exist",
        f"{tmp_path}/b.json": "b.json' does not exist\n",
        f"{tmp_path}/a.json,{tmp_path}/b.json": "b.json' does not exist\n",
        f"{tmp_path}/*.csv": "no file matches this pattern",
        f"{tmp_path}/data": "as a folder it has no data files",
        f"{tmp_path}/pipe": "is not a file",
        "x" * 5000: "does not exist",
        "hf://datasets/owner": "write it as hf://datasets/owner/name/",
    }.items():
        assert words in refused(capsys, read_all, path)


def test_compressed_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What gunzip -k leaves behind is not learnt twice."""
    for name in ("a.json", "a.json.gz"):
        write(tmp_path / name, FORMS[name[2:]](ROWS))
    assert "look like the same rows" in refused(capsys, read_all, str(tmp_path))


def test_files_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def download(repository: str, file: str, **options: Any) -> str:
        asked.append((repository, file, options))
        if file == "no.json":
            raise FileNotFoundError("404: not there\nand more")
        return write(tmp_path / "cached.json", FORMS["json"](ROWS))

    monkeypatch.setattr(files, "hf_hub_download", download)
    assert len(read_all("hf://datasets/me/mine@v1.0/data/train 1.json")) == 3
    find_files("hf://datasets/me/mine/a.json")
    assert asked == [
        ("me/mine", "data/train 1.json", {"repo_type": "dataset", "revision": "v1.0"}),
        ("me/mine", "a.json", {"repo_type": "dataset", "revision": None}),
    ]
    message = refused(capsys, read_all, "hf://datasets/me/mine/no.json")
    assert "hf://datasets/me/mine/no.json' cannot be downloaded: 404: not there" in message


def test_patterns_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """In natural order, of any revision, such as the Parquet files that the hub itself makes."""
    names = ["datasets/me/mine@refs%2Fconvert%2Fparquet/default/10.parquet", "datasets/me/mine/default/2.parquet"]
    monkeypatch.setattr(files.HfFileSystem, "glob", lambda self, url: [] if "no" in url else names)
    monkeypatch.setattr(files, "hf_hub_download", lambda repository, file, repo_type, revision: f"{file}@{revision}")
    found = find_files("hf://datasets/me/mine@refs/convert/parquet/default/*.parquet")
    assert found == ["default/2.parquet@None", "default/10.parquet@refs/convert/parquet"]
    assert "no file matches this pattern" in refused(capsys, read_all, "hf://datasets/me/mine/no*.parquet")


def test_hash(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", b"ab"), write(tmp_path / "b", b"c" * 3_000_000)
    assert hash_files([first]) == hashlib.sha256(b"ab").hexdigest()
    assert hash_files([second]) == hashlib.sha256(b"c" * 3_000_000).hexdigest()
    others = [write(tmp_path / "c", b"a"), write(tmp_path / "d", b"bc" * 3_000_000)]
    assert len({hash_files([first, second]), hash_files([second, first]), hash_files(others), hash_files([first])}) == 4


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "parquet", "jsonl.gz"])
def test_a_bad_row_near_the_end_of_the_tenth_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    for part in range(1, 11):
        write(tmp_path / f"part-{part}.{form}", FORMS[form](numbered(30, 30 * part)))
    rows = read_all(f"{tmp_path}/*.{form}")
    assert [row["instruction"] for row in rows] == [f"row {number}" for number in range(30, 330)]
    write(tmp_path / f"part-10.{form}", FORMS[form]([*numbered(28), {"instruction": " ", "output": "b"}, *numbered(1)]))
    place = {"csv": "line 30"}.get(form, "row 29" if form in ("json", "parquet") else "line 29")
    message = refused(capsys, read_all, str(tmp_path))
    assert f"{tmp_path}/part-10.{form}: {place}: 'instruction' is empty" in message


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tokens(form: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    set_prompt_format(tokenizer, "plain")
    expected = preprocess(write(tmp_path / "rows.json", json.dumps(ROWS).encode()), tokenizer, 100).dataset.to_list()
    found = preprocess(write(tmp_path / f"other.{form}", FORMS[form](ROWS)), tokenizer, 100).dataset.to_list()
    assert found == expected and len(found) == len(ROWS)


# ---- names of fields


def test_other_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rename = {"question": "instruction", "context": "input", "answer": "output"}
    rows = [{"question": "a", "context": "c", "answer": "b"}, {"question": "a", "answer": ""}]
    for form, content in FORMS.items():
        found = read_all(write(tmp_path / f"rows.{form}", content(rows)), rename=rename)
        assert found == [
            {"instruction": "a", "input": "c", "output": "b"},
            {"instruction": "a", "input": "", "output": ""},
        ]
    path = write(tmp_path / "rows.json", json.dumps(rows))
    for names, words in {
        ("question", "instruction", "anwser", "output"): "row 1: has no 'anwser' (its fields: 'question', 'context',",
        (
            "question",
            "instruction",
            "contxt",
            "input",
            "answer",
            "output",
        ): "no row has the field 'contxt', which --input",
    }.items():
        rename = dict(zip(names[::2], names[1::2], strict=True))
        assert words in refused(capsys, read_all, path, rename=rename)


def test_rename_fields() -> None:
    row = {"input": "a", "target": "b", "kind": "c"}
    renamed = rename_fields(row, {"input": "instruction", "target": "output"})
    assert renamed == {"instruction": "a", "output": "b", "kind": "c"} and "target" in row
    assert rename_fields(row, {}) == row
    swapped = rename_fields({"output": "q", "instruction": "a"}, {"output": "instruction", "instruction": "output"})
    assert swapped == {"instruction": "q", "output": "a"}
    for row, rename, words in (
        ({"a": 1, "output": 2}, {"a": "output"}, "has 'output' beside 'a'"),
        ({"b": 1}, {"a": "instruction"}, "has no 'a' (its fields: 'b'); see --instruction_field a"),
    ):
        with pytest.raises(DataError, match=re.escape(words)):
            rename_fields(row, rename)


def test_flags(run_main: Callable, tmp_path: Path, base_path: str) -> None:
    """Of inference.py; those of training are the same."""
    path = write(tmp_path / "rows.csv", "question,answer,day\na,b,1\n")
    flags = ["--model_path", base_path, "--data_path", path, "--max_new_tokens", 2]
    message = run_main(inference, *flags, expected=2)
    assert "line 2: has no 'instruction'" in message and "--instruction_field question --output_field answer" in message
    printed = run_main(inference, *flags, "--instruction_field", "question", "--output_field", "answer")
    assert json.loads(printed.splitlines()[1])["instruction"] == "a"
    for more, words in (
        (["--messages_field", "a", "--input_field", "b"], "--messages_field names whole conversations"),
        (["--instruction_field", "a", "--output_field", "a"], "must name different fields"),
    ):
        assert words in run_main(inference, *flags, *more, expected=2)
    message = run_main(inference, "--instruction", "a", "--input_field", "b", expected=2)
    assert "add --data_path" in message


# ---- streams


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "json.gz", "jsonl.zst", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, form: str) -> None:
    """Of a file of 50 MB, a few are in memory at a time."""
    row = json.dumps({"instruction": "a", "output": "你好" * 800}, ensure_ascii=False).encode()  # 5 kB
    block = {"csv": b"a,%s\n" % ("你好" * 800).encode(), "json": row + b","}.get(form.split(".")[0], row + b"\n") * 1000
    head, tail = {"csv": (b"instruction,output\n", b""), "json": (b"[", row + b"]")}.get(form.split(".")[0], (b"", b""))
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        table = pyarrow.table({"instruction": ["a"] * 1000, "output": ["你好" * 800] * 1000})
        with parquet.ParquetWriter(path, table.schema, use_dictionary=False) as writer:
            for _ in range(10):
                writer.write_table(table)
    else:
        opened = {"gz": gzip.open, "zst": lambda path, _: pyarrow.CompressedOutputStream(str(path), "zstd")}
        with opened.get(form.split(".")[-1], open)(path, "wb") as file:
            for part in (head, *[block] * 10, tail):
                file.write(part)
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_file_of(str(path)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 10_000 + (head == b"[") and peak < 20e6


def test_one_value_that_has_no_end(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """A lost bracket or quotation mark does not bring the whole file into memory."""
    monkeypatch.setattr(readers, "LONGEST", 3000)
    monkeypatch.setattr(readers, "CHUNK", 1000)
    open_row = '[{"instruction": ["a", ' + '"b", ' * 10_000
    message = refused(capsys, read_all, write(tmp_path / "a.json", open_row))
    assert "row 1: has no end within" in message
    no_comma = '[{"instruction": "a" "output": "b"}, ' + f"{json.dumps(ROWS[0])}, " * 100
    assert "row 1: not valid JSON: Expecting ','" in refused(capsys, read_all, write(tmp_path / "c.json", no_comma))
    long_row, long_line = json.dumps(ROWS[0]) + "\n", '{"instruction": "' + "b" * 10_000
    assert "line 2: has more than" in refused(capsys, read_all, write(tmp_path / "b.json", long_row + long_line))
