"""chat.py as a person uses it: typing, reading and interrupting in a pseudo-terminal."""

import os
import pty
import re
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from support import ENDOFTEXT, IM_END, REPOSITORY, make_model, make_tokenizer, save_checkpoint

from finetuning.generation import chat
from finetuning.generation.generate import make_generation_config
from finetuning.preprocessing.templates import set_prompt_format


class Terminal:
    """A process in a pseudo-terminal."""

    def __init__(self, *command: str) -> None:
        self.seen = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ |= {"TERM": "xterm", "LC_ALL": "C.UTF-8"}
            os.execv(sys.executable, [sys.executable, *command])

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def read_until(self, pattern: str, patience: float = 300) -> str:
        """The output up to a pattern; the rest is left for the next read."""
        end = time.monotonic() + patience
        while not (found := re.search(pattern, self.seen)):
            if time.monotonic() > end:
                raise TimeoutError(self.seen)
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
        shown, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return shown

    def interrupt(self, pattern: str) -> None:
        """Press Ctrl-C until a pattern is shown: readline may miss one that comes just before it begins to wait."""
        for _ in range(20):
            self.type("\x03")
            with suppress(TimeoutError):
                self.read_until(pattern, patience=15)
                return
        raise TimeoutError(self.seen)

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture(scope="module")
def talkative_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An instruct model that never ends an answer by itself."""
    model = make_model(tie_word_embeddings=False, max_position_embeddings=1_000_000)
    model.lm_head.weight.data[[ENDOFTEXT, IM_END]] = 0
    return save_checkpoint(tmp_path_factory.mktemp("talkative"), make_tokenizer("<|im_end|>"), model)


@pytest.mark.slow
def test_a_turn_an_interrupt_another_turn_the_end(talkative_path: str) -> None:
    words = "--interactive True --max_new_tokens 100000"
    terminal = Terminal(str(REPOSITORY / "inference.py"), "--model_path", talkative_path, *words.split())
    terminal.read_until("You: ")
    terminal.type("hello\n")
    terminal.read_until("Qwen: .+")  # streams
    terminal.interrupt(r"\[stopped\]\r\nYou: ")  # in the middle of the answer
    terminal.type("half a line")
    terminal.read_until("half a line")  # Ctrl-C takes back what readline has not read yet, and it would wait for it
    terminal.interrupt("You: ")
    terminal.type("again\n")
    terminal.read_until("Qwen: .+")
    terminal.interrupt(r"\[stopped\]\r\nYou: ")
    terminal.type("\x04")  # Ctrl-D
    assert terminal.exit_code() == 0


def test_bytes_that_are_not_utf8(conversation: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """Trap 67: one line, and the conversation continues."""
    assert len(conversation("<|im_end|>", ["a\udcff", "b"])) == 1
    assert "not UTF-8" in capsys.readouterr().out


def test_chinese_input_edits_properly(base_path: str) -> None:
    """A backspace removes a whole character, of three bytes and two columns; the arrow keys recall a line."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from finetuning.generation import chat; print('ready')\n"
        "import readline\n"
        "for _ in range(2): print(ascii(chat.ask('You: ')))"
    )
    terminal = Terminal("-c", script, str(REPOSITORY))
    terminal.read_until("You: ")
    terminal.type("早上\x7f安\x1b[D\x1b[D好\n")  # 早上, backspace, 安, two to the left, 好
    terminal.read_until(re.escape(ascii("好早安")))
    terminal.read_until("You: ")
    terminal.type("\x1b[A！\n")
    terminal.read_until(re.escape(ascii("好早安！")))


# ---- what the model is asked


@pytest.fixture
def conversation(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[str]], Iterator[str]]:
    """Type some lines, or Ctrl-C for None; returns the prompts that the model is asked. Ctrl-C stops each answer."""

    def talk(eos: str, lines: list[str | None], **model: int) -> list[str]:
        tokenizer = make_tokenizer(eos)
        set_prompt_format(tokenizer, "auto")
        waiting, prompts = iter(lines), []

        def answer(model: Any, tokenizer: Any, batch: list[list[int]], config: Any, streamer: Any) -> None:
            prompts.append(tokenizer.decode(batch[0]))
            streamer.put(torch.tensor(batch))
            for byte in b"aha":
                streamer.put(torch.tensor([byte]))
            raise KeyboardInterrupt

        def read(prompt: str) -> str:
            for line in waiting:
                if line is None:
                    raise KeyboardInterrupt
                return line
            raise EOFError

        monkeypatch.setattr(chat, "generate", answer)
        monkeypatch.setattr("builtins.input", read)
        chat.chat(make_model(**model), tokenizer, make_generation_config(tokenizer, 8))
        return prompts

    return talk


def test_instruct_models_remember(conversation: Callable[..., list[str]]) -> None:
    """A stopped answer stays in the conversation; /clear starts a new one; a backslash continues a line."""
    prompts = conversation("<|im_end|>", ["one \\", "two", "", "three", "/clear", "four"])
    system, turn = "<|im_start|>system\nBe kind.<|im_end|>\n", "<|im_start|>{}\n{}<|im_end|>\n".format
    start = "<|im_start|>assistant\n"
    first = system + turn("user", "one \ntwo")
    assert prompts == [
        first + start,
        first + turn("assistant", "aha") + turn("user", "three") + start,
        system + turn("user", "four") + start,
    ]


def test_an_interrupt_between_two_answers(
    conversation: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C takes a line back, also one of several: nothing is asked, and the next line is read."""
    (prompt,) = conversation("<|im_end|>", [None, "half \\", None, "again"])
    assert prompt.endswith("<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n") and "half" not in prompt
    assert capsys.readouterr().out.endswith("Qwen: aha [stopped]\n\n")


def test_a_long_conversation_loses_its_first_turns(conversation: Callable[..., list[str]]) -> None:
    prompts = conversation("<|im_end|>", ["first " * 20, "second " * 10, "third"], max_position_embeddings=260)
    assert "first" in prompts[0] and "first" in prompts[1]
    assert "first" not in prompts[2] and "second" in prompts[2]


def test_base_models_take_one_instruction(conversation: Callable[..., list[str]]) -> None:
    prompts = conversation("<|endoftext|>", ["Translate", "早安", "", "Go on", ""])
    assert prompts == ["Instruction: Translate\nInput: 早安", "Instruction: Go on"]
