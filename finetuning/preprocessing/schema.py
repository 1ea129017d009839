"""What a row of a data file means: one of the schemas below, or a reason why it is none.

    {"instruction": str, "input": str, "output": str}      and perhaps "system": str, "history": [[question, answer]]
    {"messages": [{"role": ..., "content": ...}]}          or {"conversations": [{"from": ..., "value": ...}]}

An answer may begin with a thought, <think>...</think>, or have it beside it as "reasoning_content". Whatever would
change the meaning of a row if it were left out, such as a rejected answer or an image, is refused.
"""

import json
import shlex
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from finetuning.preprocessing.templates import split_thought

EXAMPLE = '{"instruction": "翻译为英文", "input": "你好", "output": "Hello"}'
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant"}
ROLES |= {"gpt": "assistant"}
TOOL_ROLES = ("tool", "function", "function_call", "observation")
FIELDS = ("instruction", "input", "output", "reasoning_content", "system", "history", "task")
FIELDS += ("messages", "conversations")

# Fields that are refused if they hold something, and why.
PREFERENCE = "is preference data: a rejected answer would be learnt as a right one; keep only answers to learn"
TOOLS = "tool use cannot be trained here; remove these rows"
MEDIA = "only text can be trained here; remove these rows"
REFUSED = dict.fromkeys(("chosen", "rejected"), PREFERENCE)
REFUSED |= dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), TOOLS)
REFUSED |= dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), MEDIA)

# Names that other data sets give to our fields, the most telling first: Firefly has kind, input and target, ADGEN has
# content and summary, Dolly has instruction, context and response.
OTHER_NAMES = {
    "instruction": ("prompt", "question", "query", "problem", "content", "input", "text"),
    "input": ("context",),
    "output": ("completion", "answer", "response", "target", "summary", "solution", "label"),
}


class RowError(ValueError):
    """A row that cannot be used; the message says why and what to do."""


def read_row(row: Any, output_required: bool) -> dict[str, Any]:
    """Check a row, and put it into one of two forms: `instruction`, `input` and `output`, or `messages`.

    A thought is taken out of its answer and put beside it, as `reasoning_content`.

    Args:
        output_required: whether the row must hold an answer: yes for training, no for inference.

    Returns:
        The row with all its other fields. `input` is always a str; roles are system, user and assistant; a message
        may have `weight` 0, and is then not learnt. There is a `reasoning_content` only where there is a thought.

    Raises:
        RowError: for a row that cannot be used.
    """
    if not isinstance(row, dict):
        raise RowError(f"is {describe(row)}, not an object like {EXAMPLE}")
    refuse_other_meanings(row, "")
    for field in ("label", "kto_tag"):
        if str(row.get(field)).lower() == "false" and row[field] != row.get("output"):  # in a CSV it is text
            raise RowError(f"'{field}' is false: the row {PREFERENCE}")
    if "messages" in row or "conversations" in row:
        field = "messages" if "messages" in row else "conversations"
        messages = read_messages(row[field], field, row.get("system"), output_required)
        for beside in ("history", "reasoning_content"):
            if row.get(beside):
                raise RowError(f"has '{beside}' beside '{field}'; put it into '{field}'")
        return {name: value for name, value in row.items() if name not in (field, "system")} | {"messages": messages}
    check_names(row, output_required)
    row = row | {"input": "" if row.get("input") is None else row["input"]}
    for field in ("instruction", "input", "output"):
        if field in row:
            check_text(row[field], f"'{field}'")
    if row.get("system"):
        check_text(row["system"], "'system'")
    if row.get("history"):
        check_history(row["history"])
    if not row["instruction"].strip():
        raise RowError("'instruction' is empty; write what the model should do")
    thought = row.pop("reasoning_content", None)
    return row | read_answer("output", row["output"], thought) if "output" in row else row


def refuse_other_meanings(fields: dict[str, Any], where: str) -> None:
    for field, reason in REFUSED.items():
        if fields.get(field):
            raise RowError(f"{where}'{field}': {reason}")


def check_names(row: dict[str, Any], output_required: bool) -> None:
    """Require `instruction` and, for training, `output`, or say which flags name what stands for them."""
    missing = [field for field in ("instruction", "output") if field not in row]
    if "instruction" in row and (not missing or not output_required):
        return
    problem = f"has no '{missing[0]}' (its fields: {list_names(row) or 'none'})"
    chat = [name for name, value in row.items() if is_conversation(value)]
    if chat:
        raise RowError(f"{problem}; add --messages_field {shlex.quote(chat[0])}")
    flags = suggest_flags(row)
    if all(f"--{field}_field" in flags for field in missing if field == "instruction" or output_required):
        raise RowError(f"{problem}; add {flags}")
    columnar = any(isinstance(value, list | dict) for value in row.values())
    hint = f"a row is {EXAMPLE}; for other names there are --instruction_field and --output_field"
    hint = "rows must be a plain list, not nested or in columns" if columnar else hint
    raise RowError(f"{problem}; {hint}")


def suggest_flags(row: dict[str, Any]) -> str:
    """The flags that name the fields of a row, as far as their names tell what they are."""
    free = {name.lower(): name for name in row}
    flags = []
    for field, names in OTHER_NAMES.items():
        near = get_close_matches(field, free, cutoff=0.8) + [name for name in names if name in free]
        name = free.pop(field if free.get(field) == field else near[0]) if near else field
        if name != field:
            flags.append(f"--{field}_field {shlex.quote(name)}")
    return " ".join(flags)


def is_conversation(value: Any) -> bool:
    messages = isinstance(value, list) and value or [None]
    return all(isinstance(message, dict) and message.keys() & {"role", "from"} for message in messages)


def list_names(names: Iterable[str]) -> str:
    """Field names for a message, on one line that is not too long."""
    text = ", ".join(map(repr, names))
    return text if len(text) <= 200 else text[:200] + "..."


def rename_fields(row: Any, rename: dict[str, str]) -> Any:
    """Give a row's fields the names that `read_row` knows.

    Args:
        row: as it stands in the file.
        rename: for each name in the file the name here, for example {"question": "instruction"}.

    Returns:
        A new row with the other fields as they are, or what is no object, for `read_row` to refuse. A row without the
        field for `input` has no input. A conversation may be JSON text.

    Raises:
        RowError: for a row without such a field, or with another field of the new name.
    """
    if not rename or not isinstance(row, dict):
        return row
    for old, new in rename.items():
        if old not in row and new != "input":
            raise RowError(
                f"has no '{old}' (its fields: {list_names(row) or 'none'}); see --{new}_field {shlex.quote(old)}"
            )
        if old in row and new in row and new not in rename:
            raise RowError(f"has '{new}' beside '{old}', which --{new}_field names; remove one, or leave the flag out")
    row = {rename.get(name, name): value for name, value in row.items()}
    if "messages" in rename.values() and isinstance(row["messages"], str):
        try:
            row["messages"] = json.loads(row["messages"])
        except (ValueError, RecursionError) as error:
            raise RowError(f"'messages' is text, and not valid JSON: {error}") from None
    return row


def check_history(history: Any) -> None:
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise RowError("'history' must be a list of [question, answer] pairs")
    for turn in history:
        for text in turn:
            check_text(text, "'history'")
        if len(read_answer("history", turn[1], None)) > 1:
            raise RowError("'history' has a thought (<think>); write the conversation as 'messages'")


def read_answer(field: str, answer: str, thought: Any, where: str = "") -> dict[str, str]:
    """Separate an answer from its thought.

    Args:
        field: the answer's name, also in the result.
        thought: the row's own `reasoning_content`, or None.
        where: the message that holds the field, for error messages.

    Returns:
        The answer under the name `field` and, if there is one, the thought as `reasoning_content`.
    """
    inside, rest = split_thought(answer)
    if ("</think>" in answer) != answer.lstrip().startswith("<think>"):
        raise RowError(f"{where}'{field}': a thought stands before the answer, from <think> to </think>")
    if thought is not None:
        check_text(thought, f"{where}'reasoning_content'")
        if inside and thought.strip():
            raise RowError(f"{where}has a thought in '{field}' and another in 'reasoning_content'; remove one")
    inside = inside or (thought or "").strip()
    return {field: rest} | ({"reasoning_content": inside} if inside else {})


def read_messages(messages: Any, field: str, system: Any, output_required: bool) -> list[dict[str, Any]]:
    """Check a conversation, and give its messages `role`, `content` and, if it is 0, `weight`.

    Args:
        system: the row's own system text, or None.
    """
    if not isinstance(messages, list) or not messages:
        raise RowError(f"'{field}' is {describe(messages)}, not a list of {{'role': ..., 'content': ...}}")
    found = [read_message(message, f"message {number}") for number, message in enumerate(messages, 1)]
    if system:
        check_text(system, "'system'")
        found = [{"role": "system", "content": system}, *found]
    roles = [message["role"] for message in found]
    if "system" in roles[1:]:
        raise RowError("a system message may only come first, and only once")
    turns = roles[roles[0] == "system" :]
    if turns[::2] != ["user"] * len(turns[::2]) or turns[1::2] != ["assistant"] * len(turns[1::2]) or not turns:
        raise RowError(f"user and assistant must take turns, user first (found: {', '.join(roles)})")
    if output_required and roles[-1] != "assistant":
        raise RowError("does not end with an assistant message; training needs the answer")
    return found


def read_message(message: Any, where: str) -> dict[str, Any]:
    role = message.get("role", message.get("from")) if isinstance(message, dict) else None
    if role in TOOL_ROLES:
        raise RowError(f"{where} has the role '{role}': {TOOLS}")
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"{where} needs a 'role', one of {', '.join(ROLES)}")
    refuse_other_meanings(message, f"{where}: ")
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        kinds = {part.get("type") if isinstance(part, dict) else describe(part) for part in content}
        if kinds - {"text"}:
            raise RowError(f"{where}: 'content' has parts of type {', '.join(map(str, kinds - {'text'}))}: {MEDIA}")
        for part in content:
            check_text(part.get("text"), f"{where}: a part of 'content'")
        content = "".join(part["text"] for part in content)
    check_text(content, f"{where}: 'content'")
    thought = message.get("reasoning_content")
    if ROLES[role] == "assistant":
        content = read_answer("content", content, thought, f"{where}: ")
    elif thought:
        raise RowError(f"{where}: 'reasoning_content' belongs to an assistant message")
    else:
        content = {"content": content}
    return {"role": ROLES[role]} | content | ({"weight": 0} if message.get("weight") == 0 else {})


def check_text(value: Any, where: str) -> None:
    if value is None:
        raise RowError(f"{where} is null; write the text, or remove the row")
    if isinstance(value, list | dict):
        raise RowError(f"{where} is {describe(value)}, not text; a row holds one text for each field, not a column")
    if not isinstance(value, str):
        raise RowError(f"{where} is {describe(value)}, not text; put it in quotes")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(
            f"{where} has half of a surrogate pair (\\ud800 to \\udfff), which is no character; remove it"
        ) from None


def describe(value: Any) -> str:
    """A short name of a JSON value for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    names = {list: "a list", dict: "an object", str: "text"}
    return names.get(type(value), f"of the type {type(value).__name__}")  # a date of a Parquet file, for example
