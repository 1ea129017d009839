"""A conversation in the terminal."""

from contextlib import suppress
from importlib import import_module

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from finetuning.cli.console import say
from finetuning.generation.generate import AnswerStreamer, encode_question, generate
from finetuning.preprocessing.templates import prompt_format


def chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig) -> None:
    """Read what the user types and stream the answers, until Ctrl-D.

    In the format `chat` the model reads the whole conversation, in `plain` only the last instruction and its input.
    """
    with suppress(ImportError):  # Windows has none: its terminal edits lines by itself
        import_module("readline")  # input() then edits lines: arrow keys, history, wide characters
    turns = prompt_format(tokenizer) == "chat"
    say("Ctrl-C stops an answer, Ctrl-D ends. A \\ at the end of a line continues it on the next one.")
    say("/clear starts a new conversation." if turns else "Each instruction stands alone; its input may be empty.")
    longest = model.config.get_text_config().max_position_embeddings - config.max_new_tokens  # prompt, in tokens
    messages: list[dict[str, str]] = []
    while True:
        try:
            if turns:
                question = ask("You: ")
                messages = [] if question == "/clear" else messages
                if question in ("", "/clear"):
                    continue
                messages.append({"role": "user", "content": question})
                row = {"messages": messages}
            else:
                row = {"instruction": ask("Instruction: ")}
                if not row["instruction"]:
                    continue
                row["input"] = ask("Input: ")
        except KeyboardInterrupt:
            print()
            continue
        except UnicodeError:
            say("(these bytes are not UTF-8; type it again)")
            continue
        except EOFError:
            print()
            return
        prompt = encode_question(row, tokenizer)
        while len(prompt) > longest and len(messages) > 2:
            say("(the conversation is too long for the model: its first turn is left out)")
            del messages[:2]
            prompt = encode_question(row, tokenizer)
        streamer = AnswerStreamer(tokenizer)
        print("Qwen: " if turns else "Output: ", end="", flush=True)
        try:
            answer = generate(model, tokenizer, [prompt], config, streamer)[0]
            print(f" [cut at {config.max_new_tokens} tokens]" if answer.cut else "")
        except KeyboardInterrupt:
            print(" [stopped]")
        if turns:
            messages.append({"role": "assistant", "content": streamer.answer})


def ask(prompt: str) -> str:
    """Read what the user types. A backslash at the end of a line becomes a new line, and the next line is read too."""
    text = input(prompt)
    while text.endswith("\\"):
        text = text[:-1] + "\n" + input("... ")
    text.encode()  # bytes that are not UTF-8 arrive as halves of surrogate pairs
    return text.strip()
