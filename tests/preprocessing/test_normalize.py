"""rows.py: what a row means reaches the loss, or the row is refused with the reason (traps 53, 54, 58, 71)."""

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import hypothesis
import pyarrow
import pytest
from hypothesis import strategies as st
from pyarrow import parquet
from support import THINKING, make_tokenizer, preprocess, read_all

from finetuning.preprocessing.encode import IGNORE_INDEX
from finetuning.preprocessing.files import DataError
from finetuning.preprocessing.rows import LEARNT, MASKED, NO_TASK, normalize_row, plain_name, task_of
from finetuning.preprocessing.templates import set_prompt_format

SHARE_GPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
OPEN_AI = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TURNS = [*OPEN_AI, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
ROW = {"instruction": "a", "output": "b"}
HM = {"reasoning_content": "hm"}
SYSTEM = "<|im_start|>system\n{}<|im_end|>\n".format
USER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n".format


def write(tmp_path: Path, *rows: Any) -> str:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return str(path)


def learnt(path: str, **template: str) -> list[tuple[str, list[str]]]:
    """For each example, its whole text, and the texts that are supervised."""
    tokenizer = make_tokenizer("<|im_end|>", **template)
    set_prompt_format(tokenizer, "auto")
    found = []
    for example in preprocess(path, tokenizer, 1000).dataset:
        ids, gap = example["input_ids"], "\0"
        marked = [gap if label == IGNORE_INDEX else tokenizer.decode([label]) for label in example["labels"]]
        found.append((tokenizer.decode(ids), [part for part in "".join(marked).split(gap) if part]))
    return found


GOOD: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "alpaca": (ROW, SYSTEM("Be kind.") + USER("a") + "b<|im_end|>", ["b<|im_end|>"]),
    "system": (ROW | {"system": "s"}, SYSTEM("s") + USER("a") + "b<|im_end|>", ["b<|im_end|>"]),
    "history": (
        ROW | {"system": "s", "history": [["q", "p"]]},
        SYSTEM("s") + USER("q") + "p<|im_end|>\n" + USER("a") + "b<|im_end|>",
        ["p<|im_end|>", "b<|im_end|>"],
    ),
    "no history": (ROW | {"system": "", "history": [], "tools": None, "images": []}, "", ["b<|im_end|>"]),
    "ShareGPT": ({"conversations": SHARE_GPT, "system": "s"}, SYSTEM("s") + USER("a") + "b<|im_end|>", ["b<|im_end|>"]),
    "ShareGPT, other roles": ({"conversations": OPEN_AI}, "", ["b<|im_end|>"]),
    "developer": (
        {"messages": [{"role": "developer", "content": "s"}, *OPEN_AI]},
        SYSTEM("s") + USER("a") + "b<|im_end|>",
        ["b<|im_end|>"],
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 2}, OPEN_AI[1]]},
        SYSTEM("Be kind.") + USER("aa") + "b<|im_end|>",
        ["b<|im_end|>"],
    ),
    "weight 0": (
        {"messages": [OPEN_AI[0], OPEN_AI[1] | {"weight": 0}, *TURNS[2:]]},
        SYSTEM("Be kind.") + USER("a") + "b<|im_end|>\n" + USER("c") + "d<|im_end|>",
        ["d<|im_end|>"],
    ),
    "loss and train": (
        {"messages": [OPEN_AI[0], OPEN_AI[1] | {"loss": False}, *TURNS[2:]]},
        "",
        ["d<|im_end|>"],
    ),
    "weight of a table": (
        {"messages": [OPEN_AI[0], OPEN_AI[1] | {"weight": "0"}, TURNS[2], TURNS[3] | {"training": "True", "mask": 0}]},
        "",
        ["d<|im_end|>"],
    ),
    "mask": ({"messages": [OPEN_AI[0], OPEN_AI[1] | {"mask": True, "weight": 0}, *TURNS[2:]]}, "", ["d<|im_end|>"]),
    "fields of a user's message": (
        {"messages": [OPEN_AI[0] | {"train": True, "constraints": "x"}, OPEN_AI[1]]},
        "",
        ["b<|im_end|>"],
    ),
    "a part without a type": (
        {"messages": [{"role": "user", "content": [{"text": "a"}]}, OPEN_AI[1]]},
        "",
        ["b<|im_end|>"],
    ),
    "no messages": (ROW | {"messages": [], "conversations": "[]"}, "", ["b<|im_end|>"]),
    "TRL's halves as text": (
        {"prompt": json.dumps(TURNS[:3]), "completion": json.dumps(TURNS[3:])},
        "",
        ["d<|im_end|>"],
    ),
    "TRL's halves": ({"prompt": TURNS[:3], "completion": TURNS[3:]}, "", ["d<|im_end|>"]),
    "a good answer": (ROW | {"label": True}, "", ["b<|im_end|>"]),
    "a label word that is false": (ROW | {"output": "false", "label": "false"}, "", ["false<|im_end|>"]),
    "a yes/no question": (ROW | {"output": "No.", "label": False}, "", ["No.<|im_end|>"]),
    "no tools": (ROW | {"tools": "[]"}, "", ["b<|im_end|>"]),
    "an answer that mentions a tag": (ROW | {"output": "Use `</think>`."}, "", ["Use `</think>`.<|im_end|>"]),
    "null is absent": (
        ROW | {"messages": None, "conversations": None, "system": None, "history": None, "reasoning_content": None},
        SYSTEM("Be kind.") + USER("a") + "b<|im_end|>",
        ["b<|im_end|>"],
    ),
    "null in a message": (
        {"messages": [OPEN_AI[0] | {"tool_calls": None}, OPEN_AI[1] | {"reasoning_content": None, "weight": None}]},
        "",
        ["b<|im_end|>"],
    ),
    "messages as text": (
        {"messages": json.dumps(OPEN_AI)},
        SYSTEM("Be kind.") + USER("a") + "b<|im_end|>",
        ["b<|im_end|>"],
    ),
    "label words": (ROW | {"label": "positive"}, "", ["b<|im_end|>"]),
    "a label that is a number": (ROW | {"label": 0, "weight": 1.0, "train": "true"}, "", ["b<|im_end|>"]),
    "other spellings of a mask": (
        {"messages": [OPEN_AI[0], OPEN_AI[1] | {"Loss-Weight": 0}, TURNS[2], TURNS[3] | {"Masked": False}]},
        "",
        ["d<|im_end|>"],
    ),
    "an empty name of two": (
        {"messages": [OPEN_AI[0], {"from": "gpt", "content": "", "value": "b"}]},
        "",
        ["b<|im_end|>"],
    ),
    "parts of answers": (
        {"messages": [OPEN_AI[0], OPEN_AI[1] | {"content": [{"type": "output_text", "text": "b"}]}]},
        "",
        ["b<|im_end|>"],
    ),
}


@pytest.mark.parametrize(("row", "text", "answers"), GOOD.values(), ids=GOOD)
def test_what_is_supervised(tmp_path: Path, row: dict[str, Any], text: str, answers: list[str]) -> None:
    """Traps 53, 54, 71: decoded from the ids and labels of the dataset."""
    ((whole, found),) = learnt(write(tmp_path, row))
    assert found == answers and (whole == text or not text)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_names_of_reasoning(tmp_path: Path, name: str) -> None:
    """Trap 88: vLLM and OpenRouter say reasoning, Ollama thinking."""
    for row in ({"messages": [OPEN_AI[0], OPEN_AI[1] | {name: "hm"}]}, ROW | {name: "hm"}):
        ((whole, found),) = learnt(write(tmp_path, row))
        assert found == ["<think>\nhm\n</think>\n\nb<|im_end|>"]
    assert normalize_row(ROW | {name: "hm"}, {}, True)[1] == []


@hypothesis.example(name="loss", value=False)
@hypothesis.example(name="loss_mask", value=0)
@hypothesis.example(name="refusal", value="x")
@hypothesis.example(name="thinking", value="x")
@hypothesis.example(name="value", value="x")
@hypothesis.example(name="from", value="x")
@hypothesis.given(name=st.text(max_size=12), value=st.sampled_from(["x", 0, 0.5, True, False, ["y"], {"z": 1}]))
def test_every_field_of_a_message_is_honoured_refused_or_named(name: str, value: Any) -> None:
    """Trap 87, for any name: what is left out of a message is told."""
    plain = {"messages": TURNS}
    turns = [TURNS[0], TURNS[1] | {name: value}, *TURNS[2:]]
    try:
        row, ignored = normalize_row({"messages": turns}, {}, True)
    except DataError:
        return
    is_mask = value in (1, False) and plain_name(name) in (*LEARNT, *MASKED)
    assert f"messages.{name}" in ignored or row != plain or is_mask
    # nothing is named that the file does not have
    assert set(ignored) <= {f"messages.{each}" for turn in turns for each in turn}


def test_weights_of_a_rewriting_template(tmp_path: Path) -> None:
    """One example for each supervised answer, and none for the others."""
    messages = [OPEN_AI[0], OPEN_AI[1] | {"weight": 0}, *TURNS[2:]]
    examples = learnt(write(tmp_path, {"messages": messages}), chat_template=THINKING)
    assert [answers for _, answers in examples] == [["d<|im_end|>"]] and "b<|im_end|>" in examples[0][0]


def test_rows_are_counted_as_the_file_has_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, {"messages": TURNS}, ROW | {"id": 7}, ROW | {"id": 8, "source": "x", "note": None})
    learnt(path, chat_template=THINKING)
    printed = capsys.readouterr().out
    assert f"{path}: 3 rows (4 examples), all kept\n" in printed
    assert f"{path}: ignored fields: id (2 rows), source (1 rows)" in printed  # trap 54


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a masked row": (ROW | {"loss": False}, ["has the loss False: remove the row"]),
    "a masked row of a table": (ROW | {"weight": "0"}, ["has the weight '0': remove the row"]),
    "a mask of a row": (ROW | {"lossMask": [0]}, ["has the lossMask [0]: remove the row"]),
    "mask of a conversation": ({"messages": OPEN_AI, "mask": True}, ["has the mask True: remove the row"]),
    "unclear in capitals": (
        {"messages": [OPEN_AI[0], OPEN_AI[1] | {"trainOn": False}]},
        ["message 2 has 'trainOn': is it supervised or not?"],
    ),
    "names that differ": (
        {"messages": [OPEN_AI[0], OPEN_AI[1] | {"value": "c"}]},
        ["message 2: 'content' and 'value' differ; remove one"],
    ),
    "thoughts that differ": (ROW | {"reasoning": "a", "thinking": "b"}, ["'reasoning' and 'thinking' differ"]),
    "kto_tag of a table": (ROW | {"kto_tag": "0"}, ["'kto_tag' is false"]),
    "image in capitals": (ROW | {"Images": ["a.png"]}, ["'images'", "only text"]),
    "an unknown role": ({"messages": [{"role": "model", "content": "a"}]}, ["needs a 'role'", "not 'model'"]),
    "a message that is text": ({"messages": ["a"]}, ["needs a 'role'", "it is text"]),
    "half a weight": (
        {"messages": [OPEN_AI[0], OPEN_AI[1] | {"weight": 0.5}]},
        ["message 2 has the weight 0.5; an answer is supervised, or not: write 1 or 0"],
    ),
    "half a loss weight": (
        {"messages": [OPEN_AI[0], OPEN_AI[1] | {"loss_weight": "0.3"}]},
        ["message 2 has the loss_weight '0.3'; an answer is supervised, or not"],
    ),
    "masks that differ": (
        {"messages": [OPEN_AI[0], OPEN_AI[1] | {"mask": 1, "weight": 1}]},
        ["message 2 has 'weight': is it supervised or not?"],
    ),
    "halves beside messages": (
        {"messages": OPEN_AI, "prompt": OPEN_AI[:1], "completion": OPEN_AI[1:]},
        ["has 'prompt' beside 'messages'"],
    ),
    "a part that is text": (
        {"messages": [{"role": "user", "content": ["a"]}, OPEN_AI[1]]},
        ["message 1: a part of 'content' is text, not"],
    ),
    "a part of an odd type": (
        {"messages": [{"role": "user", "content": [{"type": ["text"], "text": "a"}]}, OPEN_AI[1]]},
        ["message 1", "a part of type ['text']"],
    ),
    "an unclear mask": (
        {"messages": [OPEN_AI[0], OPEN_AI[1] | {"loss_mask": 0}]},
        ["message 2 has 'loss_mask': is it supervised or not?"],
    ),
    "label": (ROW | {"label": False}, ["'label' is false", "preference data"]),
    "label of a CSV": (ROW | {"label": "False"}, ["'label' is false", "preference data"]),
    "kto_tag": ({"messages": OPEN_AI, "kto_tag": False}, ["'kto_tag' is false"]),
    "pair": ({"instruction": "a", "chosen": "b", "rejected": "c"}, ["'chosen'", "preference data"]),
    "tools": (ROW | {"tools": "[{}]"}, ["'tools'", "tool use"]),
    "tool calls": ({"messages": [OPEN_AI[0], OPEN_AI[1] | {"tool_calls": [{}]}]}, ["message 2: 'tool_calls'"]),
    "tool role": ({"conversations": [*SHARE_GPT, {"from": "observation", "value": "x"}]}, ["message 3", "tool use"]),
    "image": (ROW | {"images": ["a.png"]}, ["'images'", "only text"]),
    "image part": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, OPEN_AI[1]]},
        ["message 1", "image_url", "only text"],
    ),
    "a thought of the user's": (
        {"messages": [OPEN_AI[0] | {"reasoning_content": "hm"}, OPEN_AI[1]]},
        ["message 1: 'reas"],
    ),
    "no end of reasoning": (ROW | {"output": "<think>hm"}, ["'output': reasoning stands", "to </think>"]),
    "no start of reasoning": (ROW | {"output": "hm\n</think>\n\nb"}, ["'output': reasoning stands", "from <think>"]),
    "two thoughts": (ROW | {"output": "<think>hm</think>b", "reasoning_content": "hm"}, ["in 'output' and more"]),
    "thought in the history": (
        ROW | {"history": [["a", "<think>hm</think>b"]]},
        ["'history' has reasoning", "'messages'"],
    ),
    "thought that is a number": (ROW | {"reasoning_content": 1}, ["'reasoning_content'", "is the number 1"]),
    "thought beside messages": (
        {"messages": OPEN_AI, "reasoning_content": "hm"},
        ["'reasoning_content' beside 'messages'"],
    ),
    "history and messages": ({"messages": OPEN_AI, "history": [["a", "b"]]}, ["'history' beside 'messages'"]),
    "history of strings": (ROW | {"history": ["a"]}, ["'history' must be a list of [question, answer]"]),
    "messages beside a question": (ROW | {"messages": OPEN_AI}, ["has 'instruction' beside 'messages'"]),
    "two conversations": ({"messages": OPEN_AI, "conversations": SHARE_GPT}, ["has 'conversations' beside 'messages'"]),
    "a yes/no question, answered otherwise": (ROW | {"output": "Not here", "label": False}, ["rename 'label'"]),
    "two systems": ({"messages": [{"role": "system", "content": "s"}, *OPEN_AI], "system": "t"}, ["only once"]),
    "capitals": (
        {"Instruction": "a", "output": "b"},
        ["(its fields: 'Instruction', 'output')", "--instruction_field Instruction"],
    ),
    "other names": ({"question": "a", "answer": "b"}, ["add --instruction_field question --output_field answer"]),
    "Firefly": ({"kind": "NLI", "input": "a", "target": "b"}, ["add --instruction_field input --output_field target"]),
    "ADGEN": ({"content": "a", "summary": "b"}, ["add --instruction_field content --output_field summary"]),
    "Dolly": ({"context": "", "response": "b", "prompt": "a"}, ["--input_field context --output_field response"]),
    "a typo": ({"instuction": "a", "output": "b"}, ["add --instruction_field instuction"]),
    "other messages": ({"chat": OPEN_AI}, ["add --messages_field chat"]),
    "half a conversation": ({"prompt": OPEN_AI, "completion": "b"}, ["'prompt' and 'completion' must both be"]),
    "a list of nothing": ({"chat": []}, ["rows must be a plain list"]),
    "other answer": ({"instruction": "a", "response": "b"}, ["has no 'output'", "add --output_field response"]),
    "null output": (ROW | {"output": None}, ["'output'", "is null", "remove the row"]),
    "list output": (ROW | {"output": ["b", "c"]}, ["'output'", "is a list", "one text"]),
}


@pytest.mark.parametrize(("row", "words"), BAD.values(), ids=BAD)
def test_what_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], words: list[str]
) -> None:
    """In training and, if the row has a question at all, for inference alike, with the row's number."""
    for output_required in (True, False):
        if output_required or "'output'" not in words[0]:
            with pytest.raises(SystemExit) as stop:
                read_all(write(tmp_path, ROW, row), output_required=output_required)
            message = capsys.readouterr().err
            assert stop.value.code == 2 and "row 2: " in message and len(message.splitlines()) == 1
            for word in words:
                assert word in message


FORMATS = {
    "rows.parquet": (b"PAR1...", ["is damaged or not complete", "download it again"]),
    "text.parquet": (b"{}", ["not a Parquet file", "PAR1"]),
    "pointer.parquet": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        ["Git LFS pointer", "git lfs pull"],
    ),
    "rows.json.gz": (gzip.compress(b"[]" * 50)[:-9], ["is damaged or not complete"]),
    "zipped.json.gz": (gzip.compress(b"PK\x03\x04..."), ["is a zip file", "decompress it first"]),
    "parquet.gz": (gzip.compress(b"PAR1..."), ["is a compressed Parquet file, with gzip"]),
    "rows.xlsx": (b"PK\x03\x04...", ["an Excel file", "read_excel"]),
    "rows.xls": (b"\xd0\xcf\x11\xe0...", ["an Excel file", "read_excel"]),
    "rows.arrow": (b"ARROW1...", ["an Arrow file", "read_feather"]),
    "stream.arrow": (b"\xff\xff\xff\xff...", ["an Arrow file", "Dataset.from_file"]),
    "space.csv": (b'instruction,output\na, "b"\n', ["line 2", "a space before a quotation mark"]),
    "twice.jsonl": (
        b'{"instruction": "a", "output": "b", "output": "c"}\n',
        ["line 1", "two fields have the name 'output'"],
    ),
    "twice.json": (
        b'[{"instruction": "a", "instruction": "b", "output": "c"}]',
        ["row 1", "two fields have the name 'instruction'"],
    ),
    "bracket.csv": (b"[a],output\nb,c\n", ["line 2", "has no 'instruction' (its fields: '[a]', 'output')"]),
    "comma.json": (
        b'[{"instruction": "a" "output": "b"}, ' + b'{"instruction": "a", "output": "b"}, ' * 9,
        ["row 1: not valid JSON: Expecting ',' delimiter"],
    ),
    "rows.jsonl.bz2": (b"BZh9...", ["is damaged or not complete"]),
    "rows.json.xz": (b"\xfd7zXZ\x00...", ["xz", "unxz -k"]),
    "rows.tar.gz": (gzip.compress(b"rows.json".ljust(257, b"\0") + b"ustar\0" + b"00"), ["is a tar file", "tar xf"]),
    "rows.jsonl.zst": (b"(\xb5/\xfd...", ["is damaged or not complete"]),
    "fields.csv": (
        b"instruction,output\na,b\na,b,c\n",
        ["line 3", "has 3 fields, and the header 2", "no space before them"],
    ),
    "quote.csv": (b'instruction,output\na,"b\nc,d\n', ["line 2", "not valid CSV"]),
    "semicolons.csv": (b"instruction;output\na;b\n", ["line 1", "holds one column", "commas"]),
    "twice.csv": (b"instruction,output,output\na,b,c\n", ["two columns have the same name"]),
    "header.csv": (b"instruction,output\n", ["holds no rows"]),
    "gbk.csv": ("instruction,output\n你好,b\n".encode("gbk"), ["line 2", "GBK"]),
    "utf16.tsv": ("instruction\toutput\na\tb\n".encode("utf-16"), ["UTF-16"]),
    "words.csv": (b"messages\n[oops\n", ["line 2", "'messages' is text, and not valid JSON"]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Trap 71: never the advice for another mistake."""
    content, words = FORMATS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit):
        read_all(str(tmp_path / name))
    message = capsys.readouterr().err
    assert (
        all(word in message for word in words)
        and ("iconv" in message) == name.startswith(("gbk", "utf16"))
        and str(tmp_path / name) in message
    )


def test_zip_and_pattern(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as file:
        file.writestr("rows.json", "[]")
    for path, words in ((tmp_path / "rows.zip", "unzip"), (tmp_path / "*.json", "no file matches this pattern")):
        with pytest.raises(SystemExit):
            read_all(str(path))
        assert words in capsys.readouterr().err


def test_null_is_absent_in_every_form(tmp_path: Path) -> None:
    """Also in a file of questions, where the answer may be missing."""
    rows = [{"instruction": "a", "output": None, "task": None, "note": None}, {"instruction": "b", "output": "c"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name not in ("task", "note")}
    columns |= {name: pyarrow.nulls(2, pyarrow.string()) for name in ("task", "note")}
    parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    expected = [{"instruction": "a", "input": ""}, {"instruction": "b", "output": "c", "input": ""}]
    for name in ("rows.jsonl", "rows.parquet"):
        assert read_all(str(tmp_path / name), output_required=False) == expected
        assert task_of(expected[0]) == NO_TASK


def test_spaces_in_a_table(tmp_path: Path) -> None:
    """A space is a part of the text, and so are quotation marks in a text in quotes."""
    path = tmp_path / "rows.csv"
    path.write_text('instruction,output\na, b \n" ""a""",b\n')
    assert [(row["instruction"], row["output"]) for row in read_all(str(path))] == [("a", " b "), (' "a"', "b")]
