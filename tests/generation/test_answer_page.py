"""answer_page.py: the page says what the scores say, and no text of a row is more than text in it."""

import base64
import hashlib
import json
import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support import Run

import inference
from finetuning.generation import answer_page
from finetuning.generation.answer_page import mark_difference, write_page

EVIL = "</p></option><script>alert(1)</script><img src=x onerror=alert(2)> & \"'"


class Page(HTMLParser):
    """The elements of a page, and the texts of each kind."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag != "mark":
            self.open = tag
            self.texts.setdefault(tag, []).append("")

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.open = "" if tag == self.open else self.open


def test_rows_and_verdicts(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "input": "b", "output": "yes", "task": "one"},
        {"instruction": "c", "output": "no", "system": "s", "history": [["q", "r"]], "task": "two"},
        {"messages": [{"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]},
        {"instruction": "open"},
    ]
    predictions = [
        {"prediction": " yes\n"},
        {"prediction": "yes", "probabilities": {"yes": 0.75, "no": 0.25}},
        {"prediction": "f", "cut": True, "thought": "hm"},
        {"prediction": "g"},
    ]
    write_page(str(tmp_path / "new/page.html"), rows, predictions, "| scores |", adapter_path=None, data_path="d.json")
    page = Page(tmp_path / "new/page.html")
    articles = [attributes for tag, attributes in page.found if tag == "article"]
    assert [article["data-verdict"] for article in articles] == ["right", "wrong", "wrong", "open"]
    assert [article["data-task"] for article in articles] == ["0", "1", "2", "2"]
    assert page.texts["option"] == ["all", "one", "two", "rows"]
    assert page.texts["title"] == ["4 answers: 1 right, 2 wrong"] and page.texts["pre"] == ["| scores |"]
    assert page.texts["p"][:5] == ["data_path d.json", "a", "b", " yes\n", "s"]
    assert page.texts["p"][5:] == ["q", "r", "c", "yes", "no", "d", "hm", "f", "e", "open", "g"]
    text = (tmp_path / "new/page.html").read_text(encoding="utf-8")
    assert "probability 0.7500" in text and text.count("cut before its end") == 1


@pytest.mark.parametrize("most_compared", [answer_page.MAX_COMPARED, 0])
def test_rows_stay_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_compared: int) -> None:
    """Markup in any field of a row is shown as it stands; half a surrogate pair does no harm."""
    monkeypatch.setattr(answer_page, "MAX_COMPARED", most_compared)
    plain, evil = tmp_path / "plain.html", tmp_path / "evil.html"
    for file, text in ((plain, "word"), (evil, EVIL)):
        row = {"instruction": text, "input": text, "output": text + "!", "system": text, "task": text}
        turns = [{"role": "system", "content": text}, {"role": "user", "content": text}]
        predictions = [{"prediction": text, "thought": text}, {"prediction": text + "\ud800"}]
        write_page(str(file), [row, {"messages": turns}], predictions, text, data_path=text)
    tags = [[tag for tag, _ in Page(file).found if tag != "mark"] for file in (plain, evil)]
    assert tags[0] == tags[1]
    assert Page(evil).texts["p"] == [text.replace("word", EVIL) for text in Page(plain).texts["p"]]
    assert Page(evil).texts["option"][1] == EVIL and Page(evil).texts["pre"] == [EVIL]


def test_page_needs_nothing_else(tmp_path: Path) -> None:
    """No address, and a policy that lets only the script of the page run."""
    write_page(str(tmp_path / "page.html"), [{"instruction": "a"}], [{"prediction": "b"}], "")
    page = Page(tmp_path / "page.html")
    assert not any(name in ("src", "href", "action") for _, attributes in page.found for name in attributes)
    assert "http" not in (tmp_path / "page.html").read_text(encoding="utf-8").replace("http-equiv", "")
    policy = next(attributes["content"] for _, attributes in page.found if "http-equiv" in attributes)
    [script] = page.texts["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    for word in ("width=device-width", "prefers-color-scheme: dark"):
        assert word in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_differences() -> None:
    """Words of an alphabet are compared whole, Chinese character by character."""
    assert mark_difference("我喜欢猫。", "我喜爱猫。") == (
        '我喜<mark class="extra">欢</mark>猫。',
        '我喜<mark class="missing">爱</mark>猫。',
    )
    assert mark_difference("the cat", "the <hat>") == (
        'the <mark class="extra">cat</mark>',
        'the <mark class="missing">&lt;hat&gt;</mark>',
    )
    assert mark_difference("<b> cat", "<b> ") == ('&lt;b&gt; <mark class="extra">cat</mark>', "&lt;b&gt; ")
    assert mark_difference("<i>", "") == ('<mark class="extra">&lt;i&gt;</mark>', "")
    assert mark_difference("good", "good morning") == ("good", 'good<mark class="missing"> morning</mark>')
    long = "的一是" * 200  # common characters are no noise
    assert mark_difference("好" + long, long) == ('<mark class="extra">好</mark>' + long, long)


def test_from_the_command_line(run_main: Run, base_path: str, rows_path: str, tmp_path: Path) -> None:
    run = partial(run_main, inference, "--model_path", base_path, "--max_new_tokens", 4)
    file = tmp_path / "answers.html"
    printed = run("--data_path", rows_path, "--report", file)
    answers = [json.loads(line)["prediction"] for line in printed.splitlines() if line.startswith("{")]
    shown = re.findall('data-verdict="(\\w+)"', file.read_text(encoding="utf-8"))
    rows = json.loads(Path(rows_path).read_text(encoding="utf-8"))
    right = [answer.strip() == row["output"] for answer, row in zip(answers, rows, strict=True)]
    assert [verdict == "right" for verdict in shown] == right and f"as a page: {file}" in printed
    assert "already exists" in run("--data_path", rows_path, "--report", file, expected=2)
    assert "--data_path" in run("--instruction", "a", "--report", "b.html", expected=2)
    assert "cannot be written" in run("--data_path", rows_path, "--report", file / "b.html", expected=1)
