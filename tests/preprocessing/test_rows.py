"""Traps 15 and 37: a data file is understood or refused, in one or two lines that name the row and the remedy."""

import json
import os
from pathlib import Path

import pytest
from support import read_all

ROW = {"instruction": "翻译为英文", "input": "你好", "output": "Hello"}


def write(tmp_path: Path, content: str | bytes) -> str:
    path = tmp_path / "data.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([ROW, ROW], ensure_ascii=False),
        "\ufeff" + json.dumps([ROW, ROW]),
        json.dumps(ROW) + "\n\n" + json.dumps(ROW, ensure_ascii=False) + "\n",
        json.dumps(ROW) + "\r\n" + json.dumps(ROW),
        json.dumps([ROW | {"task": 1, "extra": None}, ROW], indent=2),
    ],
    ids=["list", "byte-order mark", "lines", "CRLF lines", "other fields"],
)
def test_good_files(tmp_path: Path, content: str) -> None:
    rows = read_all(write(tmp_path, content))
    assert [{name: row[name] for name in ROW} for row in rows] == [ROW, ROW]


def test_null_and_absent_input_are_empty(tmp_path: Path) -> None:
    rows = read_all(write(tmp_path, json.dumps([ROW | {"input": None}, {"instruction": "a", "output": "b"}])))
    assert [row["input"] for row in rows] == ["", ""]


def test_strings_stay_strings(tmp_path: Path) -> None:
    """What looks like a date, a number, a boolean or a line break to other readers is text."""
    texts = ["2024-01-01", "007", "true", "null", "1e5", "a\u2028b\u0085c", " "]
    rows = [{"instruction": "x", "input": text, "output": text} for text in texts]
    for content in (json.dumps(rows), "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)):
        assert [row["output"] for row in read_all(write(tmp_path, content))] == texts


def test_changed_file_is_read_again(tmp_path: Path) -> None:
    """There is no cache: a changed file is read again even if its size and time are the same."""
    path = Path(write(tmp_path, json.dumps([ROW])))
    read_all(str(path))
    stat = path.stat()
    path.write_text(json.dumps([ROW | {"output": "HELLO"}]), encoding="utf-8")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert read_all(str(path))[0]["output"] == "HELLO"


GOOD = json.dumps(ROW)
BAD_FILES = {
    "empty": ("", ["holds no rows"]),
    "white space": (" \n\t", ["holds no rows"]),
    "empty list": ("[]", ["holds no rows"]),
    "utf-16": (GOOD.encode("utf-16"), ["UTF-16", "iconv"]),
    "utf-16 without mark": (GOOD.encode("utf-16-le"), ["UTF-16", "iconv"]),
    "gbk": (json.dumps([ROW], ensure_ascii=False).encode("gbk"), ["GBK", "iconv"]),
    "broken list": (f"[{GOOD}, {{]", ["row 2", "not valid JSON", "{]"]),
    "broken line": (f"{GOOD}\n{GOOD[:-3]}\n{GOOD}", ["line 2"]),
    "cut off": (f"[{GOOD},", ["not valid JSON"]),
    "not json": ("instruction,output\na,b", ["line 1", "not valid JSON"]),
    "number": ("42", ["line 1", "the number 42"]),
    "string rows": ('["a"]', ["row 1", "is text"]),
    "nested": (json.dumps({"data": [ROW]}), ["no 'instruction'", "'data'", "nested"]),
    "columns": (json.dumps({"instruction": ["a"], "output": ["b"]}), ["'instruction'", "a list"]),
    "columns over lines": (json.dumps({"instruction": ["a"], "output": ["b"]}, indent=1), ["the file", "a list"]),
    "no output": (json.dumps([ROW, {"instruction": "a"}]), ["row 2", "no 'output'"]),
    "misspelt": (json.dumps([{"instuction": "a", "output": "b"}]), ["row 1", "'instuction'"]),
    "number for text": (json.dumps([ROW, ROW | {"output": 5}]), ["row 2", "'output'", "the number 5", "the word"]),
    "null for text": (json.dumps([ROW | {"output": None}]), ["row 1", "'output'", "null"]),
    "boolean": (json.dumps([ROW | {"input": True}]), ["'input'", "the boolean true"]),
    "list for text": (json.dumps([ROW | {"instruction": ["a"]}]), ["'instruction'", "a list"]),
    "not a number": ('[{"instruction": "a", "output": NaN}]', ["'output'", "number nan"]),
    "empty instruction": (json.dumps([ROW | {"instruction": " "}]), ["'instruction' is empty"]),
    "half a character": ('[{"instruction": "a", "output": "\\ud83d"}]', ["surrogate"]),
    "long number": ('[{"instruction": "a", "output": ' + "9" * 5000 + "}]", ["not valid JSON"]),
    "deep": ("[" * 100_000, ["not valid JSON"]),
    "messages not a list": (json.dumps([{"messages": "hi"}]), ["'messages' is text, and not valid JSON"]),
    "unknown role": (json.dumps([{"messages": [{"role": "bot", "content": "a"}]}]), ["message 1", "'role'"]),
    "no content": (json.dumps([{"messages": [{"role": "user"}]}]), ["message 1", "null"]),
    "no answer": (json.dumps([{"messages": [{"role": "user", "content": "a"}]}]), ["assistant message"]),
    "late system": (
        json.dumps([{"messages": [{"role": role, "content": "a"} for role in ("user", "assistant", "system")]}]),
        ["system message"],
    ),
    "assistant first": (json.dumps([{"messages": [{"role": "assistant", "content": "a"}]}]), ["user first"]),
}


@pytest.mark.parametrize(("content", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | bytes, words: list[str]) -> None:
    path = write(tmp_path, content)
    with pytest.raises(SystemExit) as stop:
        read_all(path)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert len(message.strip().splitlines()) <= 2
    assert len(message) < 600
    for word in ["error: ", path, *words]:
        assert word in message


def test_missing_file_and_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, words in ((tmp_path / "no.json", "does not exist"), (tmp_path, "is not a file")):
        with pytest.raises(SystemExit) as stop:
            read_all(str(path))
        assert stop.value.code == 2
        assert words in capsys.readouterr().err


def test_inference_needs_no_output(tmp_path: Path) -> None:
    rows = [{"instruction": "a"}, {"messages": [{"role": "user", "content": "b"}]}]
    assert len(read_all(write(tmp_path, json.dumps(rows)), output_required=False)) == 2
