"""Step 3: what a row means. It is brought into one of two forms, or refused with the reason.

    {"instruction": str, "input": str, "output": str}      and perhaps "system": str, "history": [[question, answer]]
    {"messages": [{"role": ..., "content": ...}]}          or {"conversations": [{"from": ..., "value": ...}]}

An answer may begin with reasoning, <think>...</think>, or have it beside it as "reasoning_content". Whatever would
change the meaning of a row if it were left out, such as a rejected answer or an image, is refused.
"""

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from itertools import chain, islice
from typing import Any
from unicodedata import normalize

from finetuning.cli.console import say, warn
from finetuning.preprocessing.files import EXAMPLE, DataError
from finetuning.preprocessing.readers import NOT_READ, parse_json, read_file

Row = dict[str, Any]

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant"}
ROLES |= {"gpt": "assistant"}
TOOL_ROLES = ("tool", "function", "function_call", "observation")
JSON_FIELDS = ("messages", "conversations", "history")  # may be JSON text, as in a table
ABSENT_IF_EMPTY = (*JSON_FIELDS, "system", "reasoning_content", "task")  # a table has no other way to leave them out
FIELDS = ("instruction", "input", "output", *ABSENT_IF_EMPTY)
# Fields of a message, by their names in OpenAI's, ShareGPT's, vLLM's, Ollama's, ms-swift's and Axolotl's data.
ROLE, CONTENT, REASONING = ("role", "from"), ("content", "value"), ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")  # types of a part of a content
LEARNT, MASKED = ("weight", "loss", "train", "training", "loss_weight"), ("mask", "masked")
UNCLEAR = "loss|train|training|trainable|untrained|weight|mask|masked|learn|ignore|skip|exclude|supervised?|sft"
UNCLEAR = re.compile(rf"(^|_)({UNCLEAR})(_|$)")  # loss_mask, and any other spelling of it
YES_OR_NO = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}  # in a table it is text
NO_TASK = "rows"  # the task of rows that name none
LONGEST_LABEL = 40  # characters

PAIR = ("prompt", "completion")  # TRL's halves of a conversation, of which the second is supervised

# Fields that are refused if they hold something, and why.
PREFERENCE = "is preference data: a rejected answer would be learnt as a right one; keep only answers to learn"
TOOLS = "tool use cannot be trained here; remove these rows"
MEDIA = "only text can be trained here; remove these rows"
REFUSED = dict.fromkeys(("chosen", "rejected"), PREFERENCE)
REFUSED |= dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), TOOLS)
REFUSED |= dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), MEDIA)
NOTHING = ("", "[]", "{}", "null")  # JSON text that holds nothing
# If one of these is false, the answer is a rejected one, unless it is the answer to a yes/no question.
JUDGEMENTS = ("label", "kto_tag", "desirable", "is_correct")
NO = ("false", "no", "incorrect", "wrong", "否", "不", "不是", "不对", "错", "错误", "假")

# Names that other data sets give to our fields, the most telling first: Firefly has kind, input and target, ADGEN has
# content and summary, Dolly has instruction, context and response.
OTHER_NAMES = {
    "instruction": ("prompt", "question", "query", "problem", "content", "input", "text"),
    "input": ("context",),
    "output": ("completion", "answer", "response", "target", "summary", "solution", "label"),
}
# The end of reasoning whose beginning is missing. Without a line break after it, an answer merely mentions the tag.
UNOPENED = re.compile(r"</think>[ \t]*\n")
JSON = json.JSONEncoder(ensure_ascii=False, default=str)


def read_rows(
    data_path: str, files: list[str], rename: dict[str, str], output_required: bool, max_rows: int | None = None
) -> Iterator[tuple[str, Row, list[str]]]:
    """Read and check the rows of files, one after the other, and nothing beyond `max_rows`.

    Args:
        rename: for each field of the files that has another name here, that name: {"question": "instruction"}.
        output_required: whether each row must hold an answer: yes for training, no for inference.

    Yields:
        Where a row stands (its file, and its row or line from 1), the row from `normalize_row`, its ignored fields.

    Raises:
        DataError: with the file, the row, the field and the remedy.
    """
    unseen, fields, count = set(rename), {*FIELDS, *REFUSED, *JUDGEMENTS, *PAIR, *rename}, 0

    def check(file: str) -> Iterator[tuple[str, Row, list[str]]]:
        location, index = file, None
        try:
            for index, value in read_file(file, fields):
                location = f"{file}: {index}"
                row, ignored = normalize_row(value, rename, output_required)
                unseen.difference_update(value)
                yield location, row, ignored
                location = file
            if index is None:
                raise DataError(f"holds no rows; it should hold rows like {EXAMPLE}")
        except DataError as error:
            raise DataError(f"{location}: {error}") from None

    for row in islice(chain.from_iterable(map(check, files)), max_rows):
        count += 1
        yield row
    for name in unseen:  # an input that is misspelt would be missing everywhere
        message = f"{data_path}: no row has the field '{name}', which --{rename[name]}_field names"
        if max_rows is None or count < max_rows:
            raise DataError(message)
        warn(f"{message}, among the first {max_rows}")


def normalize_row(value: Any, rename: dict[str, str], output_required: bool) -> tuple[Row, list[str]]:
    """Check a row, and put it into one of two forms: `instruction`, `input` and `output`, or `messages`.

    What is null is absent, in the row and in its messages. Reasoning is taken out of its answer and put beside it.

    Returns:
        The row with all its other fields, and their names: they are ignored. `input` is always a str; roles are system,
        user and assistant; a message may have `weight` 0, and is then masked.

    Raises:
        DataError: for a row that cannot be used.
    """
    if not isinstance(value, dict):
        raise DataError(f"is {describe(value)}, not an object like {EXAMPLE}")
    row = {name: inner for name, inner in rename_fields(value, rename).items() if inner is not None}
    for name in (*JSON_FIELDS, *PAIR):
        text = row.get(name)
        if isinstance(text, str) and (text if name in JSON_FIELDS else text.lstrip().startswith("[{")):
            try:
                row[name] = parse_json(text)
            except ValueError as error:
                raise DataError(f"'{name}' is text, and not valid JSON: {error}") from None
    empty = dict.fromkeys(ABSENT_IF_EMPTY, ("",)) | dict.fromkeys(JSON_FIELDS, ("", []))
    row = {name: inner for name, inner in row.items() if inner not in empty.get(name, ())}
    if "messages" not in row and all(is_conversation(row.get(name)) for name in PAIR):
        answers = [turn for turn in row["prompt"] if ROLES.get(turn.get("role", turn.get("from"))) == "assistant"]
        for turn in answers:
            turn["weight"] = 0
        row["messages"] = row.pop("prompt") + row.pop("completion")
    ignored = [name for name in row if name not in FIELDS]
    row = {name: inner for name, inner in row.items() if inner is not NOT_READ}
    refuse_other_meanings(row, "")
    refuse_masks(row)
    for field in ("messages", "conversations"):
        if field in row:
            beside = [name for name in (*FIELDS, *PAIR) if name not in (field, "system", "task") and row.get(name)]
            if beside:
                raise DataError(f"has '{beside[0]}' beside '{field}'; remove one of them")
            messages, others = read_messages(row.pop(field), field, row.pop("system", None), output_required)
            return row | {"messages": messages}, ignored + others
    check_names(row, value, output_required)
    reasoning = take_first(row, REASONING, "")
    ignored = [name for name in ignored if name not in REASONING]
    row.setdefault("input", "")
    for name in ("instruction", "input", "output", "system"):
        check_text(row.get(name, ""), f"'{name}'")
    check_history(row.get("history") or [])
    if not row["instruction"].strip():
        raise DataError("'instruction' is empty; write what the model should do")
    return row | separate_reasoning("output", row["output"], reasoning) if "output" in row else row, ignored


def rename_fields(row: Row, rename: dict[str, str]) -> Row:
    """Give fields the names that they have here; a row without the field for `input` has no input."""
    for old, new in rename.items():
        if old not in row and new != "input":
            hint = f"see --{new}_field {shlex.quote(old)}"
            raise DataError(f"has no '{old}' (its fields: {list_names(row)}); {hint}")
        if old in row and row.get(new) is not None and new not in rename:
            raise DataError(f"has '{new}' beside '{old}', which --{new}_field names; remove one, or leave the flag out")
    others = {name: value for name, value in row.items() if name not in rename.values() or value is not None}
    return {rename.get(name, name): value for name, value in others.items()}


def refuse_other_meanings(fields: Row, where: str) -> None:
    fields = {name.lower(): value for name, value in fields.items()}
    for field, reason in REFUSED.items():
        value = fields.get(field)
        if value and not (isinstance(value, str) and value.strip() in NOTHING):
            raise DataError(f"{where}'{field}': {reason}")
    for name in JUDGEMENTS:
        words = ("false",) if name == "label" else ("false", "0", "0.0", "-1")  # a label may be a number
        is_false = name in fields and str(fields[name]).strip().lower() in words  # in a CSV it is text
        if is_false and str(fields.get("output")).strip(" \n.!。！").lower() not in NO:
            raise DataError(
                f"{where}'{name}' is false: the row {PREFERENCE}; if it says something else, rename '{name}'"
            )


def refuse_masks(row: Row) -> None:
    """Refuse a row that is masked as a whole: only an answer of a conversation can be."""
    for name, value in row.items():
        plain = plain_name(name)
        is_set = YES_OR_NO.get(str(value).lower()) if plain in (*LEARNT, *MASKED) else None
        if plain == "loss_mask" or is_set is not None and is_set == (plain in MASKED):
            raise DataError(f"has the {name} {value!r}: remove the row or the field, or mask answers of 'messages'")


def plain_name(name: str) -> str:
    """A field's name as others spell it: loss_mask, of lossMask, LOSS_MASK or loss-mask."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[-\s]", "_", name).lower().strip("_")


def check_names(row: Row, raw: Row, output_required: bool) -> None:
    """Require `instruction` and, for training, `output`, or say which flags name what stands for them."""
    missing = [name for name in ("instruction", "output")[: 1 + output_required] if name not in row]
    if not missing:
        return
    if missing[0] in raw:
        raise DataError(f"'{missing[0]}' is null; write the text, or remove the row")
    chat, flags = [name for name, value in row.items() if is_conversation(value)], suggest_flags(row)
    if chat and row.keys() >= set(PAIR):
        remedy = f"{' and '.join(map(repr, PAIR))} must both be text, or both be lists of messages"
    elif chat:
        remedy = f"add --messages_field {shlex.quote(chat[0])}"
    elif all(f"--{name}_field" in flags for name in missing):
        remedy = f"add {flags}"
    elif any(isinstance(value, list | dict) for value in row.values()):
        remedy = "rows must be a plain list, not nested or in columns"
    else:
        remedy = f"a row is {EXAMPLE}; for other names there are --instruction_field and --output_field"
    raise DataError(f"has no '{missing[0]}' (its fields: {list_names(row)}); {remedy}")


def suggest_flags(row: Row) -> str:
    """The flags that name the fields of a row, as far as their names tell what they are."""
    free, flags = {name.lower(): name for name in row}, []
    for field, names in OTHER_NAMES.items():
        near = get_close_matches(field, free, cutoff=0.8) + [name for name in names if name in free]
        name = free.pop(field if free.get(field) == field else near[0]) if near else field
        flags += [f"--{field}_field {shlex.quote(name)}"] if name != field else []
    return " ".join(flags)


def is_conversation(value: Any) -> bool:
    turns = value if isinstance(value, list) else []
    return bool(turns) and all(isinstance(turn, dict) and turn.keys() & set(ROLE) for turn in turns)


def list_names(names: Iterable[str]) -> str:
    """Field names for a message, on one line that is not too long."""
    text = ", ".join(map(repr, names)) or "none"
    return text if len(text) <= 200 else text[:200] + "..."


def check_history(history: Any) -> None:
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise DataError("'history' must be a list of [question, answer] pairs")
    for text in chain.from_iterable(history):
        check_text(text, "'history'")
    if any("reasoning_content" in separate_reasoning("history", answer, None) for _, answer in history):
        raise DataError("'history' has reasoning (<think>); write the conversation as 'messages'")


def split_reasoning(text: str) -> tuple[str, str]:
    """The reasoning at the beginning of a text and the answer after it; reasoning that does not end is all there is."""
    if not text.lstrip().startswith("<think>"):
        return "", text
    reasoning, _, answer = text.lstrip().removeprefix("<think>").partition("</think>")
    return reasoning.strip(), answer.lstrip("\n")


def separate_reasoning(field: str, answer: str, beside: Any, where: str = "") -> dict[str, str]:
    """The answer under its name `field` and, if there is some, its reasoning as `reasoning_content`.

    Args:
        beside: the row's or the message's own `reasoning_content`, or None.
        where: the message that holds the field, for error messages.
    """
    reasoning, rest = split_reasoning(answer)
    begins, unopened = answer.lstrip().startswith("<think>"), UNOPENED.search(answer)
    if begins and "</think>" not in answer or unopened and "<think>" not in answer[: unopened.start()]:
        raise DataError(f"{where}'{field}': reasoning stands before the answer, from <think> to </think>")
    check_text(beside or "", f"{where}'reasoning_content'")
    beside = (beside or "").strip()
    if reasoning and beside:
        raise DataError(f"{where}has reasoning in '{field}' and more in 'reasoning_content'; remove one of them")
    return {field: rest} | ({"reasoning_content": reasoning or beside} if reasoning or beside else {})


def read_messages(messages: Any, field: str, system: Any, output_required: bool) -> tuple[list[Row], list[str]]:
    """Check a conversation, before which the row's own `system` text may stand; returns it and its ignored fields."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"'{field}' is {describe(messages)}, not a list of {{'role': ..., 'content': ...}}")
    found, others = zip(*(read_message(each, f"message {n}") for n, each in enumerate(messages, 1)), strict=True)
    ignored = [f"{field}.{name}" for name in dict.fromkeys(chain.from_iterable(others))]
    if system is not None:
        check_text(system, "'system'")
        found = ({"role": "system", "content": system}, *found)
    roles = [message["role"] for message in found]
    if "system" in roles[1:]:
        raise DataError("a system message may only come first, and only once")
    turns = roles[roles[0] == "system" :]
    if not turns or turns != (["user", "assistant"] * len(turns))[: len(turns)]:
        raise DataError(f"user and assistant must take turns, user first (found: {', '.join(roles)})")
    if output_required and roles[-1] != "assistant":
        raise DataError("does not end with an assistant message; training needs the answer")
    return list(found), ignored


def read_message(message: Any, where: str) -> tuple[Row, Row]:
    """Check a message: its `role`, `content`, perhaps `reasoning_content` and, if it is masked, `weight` 0.

    Returns:
        The message with these fields, and its other fields, which mean nothing here.
    """
    fields = {name: value for name, value in message.items() if value is not None} if isinstance(message, dict) else {}
    role, content, reasoning = (take_first(fields, names, f"{where}: ") for names in (ROLE, CONTENT, REASONING))
    if role in TOOL_ROLES:
        raise DataError(f"{where} has the role '{role}': {TOOLS}")
    if not isinstance(role, str) or role not in ROLES:
        found = f", not {role!r}" if role else "" if isinstance(message, dict) else f"; it is {describe(message)}"
        raise DataError(f"{where} needs a 'role', one of {', '.join(ROLES)}{found}")
    refuse_other_meanings(fields, f"{where}: ")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict):
                raise DataError(
                    f"{where}: a part of 'content' is {describe(part)}, not {{'type': 'text', 'text': ...}}"
                )
            if part.get("type", "text") not in TEXT_PARTS:
                raise DataError(f"{where}: 'content' has a part of type {part['type']}: {MEDIA}")
            check_text(part.get("text"), f"{where}: a part of 'content'")
        content = "".join(part["text"] for part in content)
    check_text(content, f"{where}: 'content'")
    if ROLES[role] != "assistant":  # which is never supervised
        if reasoning:
            raise DataError(f"{where}: 'reasoning_content' belongs to an assistant message")
        return {"role": ROLES[role], "content": content}, fields
    texts = separate_reasoning("content", content, reasoning, f"{where}: ")
    weights = set()
    plain_names = {plain_name(name): name for name in fields}
    for name in [name for name in (*LEARNT, *MASKED) if name in plain_names]:
        value = fields.pop(plain_names.pop(name))
        is_set = YES_OR_NO.get(str(value).lower())
        if is_set is None:
            raise DataError(f"{where} has the {name} {value!r}; an answer is supervised, or not: write 1 or 0")
        weights.add(is_set != (name in MASKED))
    unclear = [name for plain, name in plain_names.items() if UNCLEAR.search(plain)]
    for name in [*unclear, *(["weight"] if len(weights) > 1 else [])]:
        raise DataError(f"{where} has '{name}': is it supervised or not? say it once, as 'weight', 1 or 0")
    return {"role": "assistant"} | texts | ({"weight": 0} if False in weights else {}), fields


def take_first(fields: Row, names: tuple[str, ...], where: str) -> Any:
    """Take what these names stand for out of a message; None if it has none of them."""
    values = {name: fields.pop(name) for name in names if name in fields}
    values = {name: value for name, value in values.items() if value != ""} or values
    value = next(iter(values.values()), None)
    if any(other != value for other in values.values()):
        raise DataError(f"{where}{' and '.join(map(repr, values))} differ; remove one of them")
    return value


def check_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        remedy = "write it, or remove the row" if value is None else "write the word it stands for"
        if isinstance(value, list | dict):
            remedy = "a row holds one text for each field, not a column"
        raise DataError(f"{where} is {describe(value)}, not text; {remedy}")
    try:
        value.encode()
    except UnicodeEncodeError:
        reason = "has half of a surrogate pair (\\ud800 to \\udfff), which is no character; remove it"
        raise DataError(f"{where} {reason}") from None


def describe(value: Any) -> str:
    """A short name of a JSON value for a message."""
    if isinstance(value, int | float):
        return f"the {'boolean' if isinstance(value, bool) else 'number'} {str(value).lower()}"
    names = {type(None): "null", list: "a list", dict: "an object", str: "text"}
    return names.get(type(value), f"of the type {type(value).__name__}")  # a date of a Parquet file, for example


# ---- what rows hold


def task_of(row: Row) -> str:
    return str(row.get("task", NO_TASK)).encode("utf-8", "backslashreplace").decode()


def expected_answer(row: Row) -> str | None:
    """The answer in a row: its output, or its last message if that is the assistant's; None without an answer."""
    last = row["messages"][-1] if "messages" in row else {"role": "assistant", "content": row.get("output")}
    return last["content"] if last["role"] == "assistant" else None


def right_answer(row: Row) -> str | None:
    """The expected answer, if it is one to compare with: a masked one may be wrong."""
    return expected_answer(row) if "messages" not in row or is_learnt(row["messages"][-1]) else None


def is_learnt(message: Row) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def as_label(answer: str | None) -> str | None:
    """An answer that may be a label word, in NFC; None for one that is empty, long or has several lines."""
    return to_nfc(answer) if answer and len(answer) <= LONGEST_LABEL and "\n" not in answer else None


def to_nfc(text: str) -> str:
    """The text in composed Unicode, as Qwen's tokenizer makes it: a model can give no other answer."""
    return normalize("NFC", text)


def to_record(location: str, row: Row, ignored: list[str], drop_reasoning: bool) -> dict[str, Any]:
    """A row as JSON text and what the summary counts: columns of `dataset.TABLE`, and where the row stands."""
    learnt = [row] if "output" in row else [turn for turn in row["messages"] if is_learnt(turn)]
    answers = [part.get("content", row.get("output")) for part in learnt]
    answers += [answer for _, answer in row.get("history") or ()]
    counts = {"has_reasoning": any("reasoning_content" in part for part in learnt)}
    counts |= {"is_empty": not all(map(str.strip, answers)), "task": task_of(row), "ignored": as_json(ignored)}
    counts |= {"label": as_label(right_answer(row))}
    return {"location": location, "row": as_json(without_reasoning(row) if drop_reasoning else row)} | counts


def without_reasoning(row: Row) -> Row:
    row = {name: value for name, value in row.items() if name != "reasoning_content"}
    return row | ({"messages": [without_reasoning(each) for each in row["messages"]]} if "messages" in row else {})


def as_json(value: Any) -> str:
    """JSON in valid UTF-8: an ignored field may hold half of a surrogate pair, for which its escape \\ud800 stands."""
    return JSON.encode(value).encode("utf-8", "backslashreplace").decode()


def print_ignored(path: str, counts: dict[str, int]) -> None:
    """Print how many rows have each of the fields that mean nothing here."""
    if counts:
        say(f"{path}: ignored fields: {', '.join(f'{name} ({count:,} rows)' for name, count in counts.items())}")
