"""generate.py: where answers end; a batch, a stream and a single row get the same answers (traps 2, 16, 46)."""

from pathlib import Path

import pytest
import torch
from support import ENDOFTEXT, IM_END, force, make_model, make_tokenizer, save_checkpoint
from transformers import PreTrainedTokenizerBase

from common import load_model
from finetuning.cli.arguments import ModelArguments
from finetuning.generation.generate import AnswerStreamer, generate, make_generation_config
from finetuning.preprocessing.encode import encode
from finetuning.preprocessing.templates import set_prompt_format

PROMPTS = [[*f"{'ab' * n} c{n}".encode()] for n in range(8)]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = make_tokenizer()
    set_prompt_format(tokenizer, "auto")
    return tokenizer


@pytest.mark.parametrize("stop", [ENDOFTEXT, IM_END])
def test_both_stop_tokens_end_an_answer(tokenizer: PreTrainedTokenizerBase, stop: int) -> None:
    """Trap 2: the model's own generation configuration has only <|endoftext|>."""
    model = make_model()
    prompt = encode([{"role": "user", "content": "a"}], tokenizer)[-1]["input_ids"]
    assert model.generation_config.eos_token_id == ENDOFTEXT
    force(model, len(prompt), [*b"\nOutput: ok", stop, *b"never"])
    answer = generate(model, tokenizer, [prompt], make_generation_config(tokenizer, 16))[0]
    assert (answer.text, answer.cut) == ("ok", False)
    assert answer.token_ids == [*b"\nOutput: ok", stop]
    assert generate(model, tokenizer, [prompt], make_generation_config(tokenizer, 5))[0].cut


def test_the_models_own_configuration_is_ignored(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Trap 46: Qwen2.5-Instruct asks for sampling, with a repetition penalty; and transformers would warn of it."""
    config = make_generation_config(tokenizer, 12)
    expected = [answer.token_ids for answer in generate(make_model(), tokenizer, PROMPTS, config)]
    model = make_model()
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=20, repetition_penalty=1.5, min_new_tokens=12)
    model.generation_config.min_new_tokens = None
    assert [answer.token_ids for answer in generate(model, tokenizer, PROMPTS, config)] == expected

    model.generation_config.repetition_penalty, model.generation_config.do_sample = 1.5, True
    path = save_checkpoint(tmp_path / "sampling", tokenizer, model)
    model = load_model(ModelArguments(model_path=path), torch.float32, torch.device("cpu"))
    assert model.generation_config.temperature is None and not model.generation_config.do_sample


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_batches_answer_as_single_rows(tokenizer: PreTrainedTokenizerBase, penalty: float) -> None:
    """transformers' own penalty counts the padding of a batch, which is a stop token, and the words of the prompt."""
    model, config = make_model(), make_generation_config(tokenizer, 12, repetition_penalty=penalty)
    single = [generate(model, tokenizer, [prompt], config)[0].token_ids for prompt in PROMPTS]
    assert [answer.token_ids for answer in generate(model, tokenizer, PROMPTS, config)] == single
    assert len(set(map(tuple, single))) > 4
    repeated = sum(len(ids) - len(set(ids)) for ids in single)
    assert (repeated < 20) == (penalty > 1), repeated


def test_sampling(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make_model()

    def draw(**sampling: float) -> list[int]:
        torch.manual_seed(0)
        return generate(model, tokenizer, PROMPTS[:1], make_generation_config(tokenizer, 12, True, **sampling))[
            0
        ].token_ids

    greedy = generate(model, tokenizer, PROMPTS[:1], make_generation_config(tokenizer, 12))[0].token_ids
    assert draw() == draw() != greedy
    assert draw(temperature=1e-4) == draw(top_p=1e-4) == greedy


TEXTS = ["ok", " Good morning.\nYes", "早安，世界", "\n", "", "Out", "🙂 done", "\nOutput: twice"]


@pytest.mark.parametrize("eos", ["<|endoftext|>", "<|im_end|>"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_is_the_answer_in_pieces(text: str, eos: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every character arrives whole and at once, and nothing of the format is shown."""
    tokenizer = make_tokenizer(eos)
    set_prompt_format(tokenizer, "auto")
    model, said = make_model(), (f"\nOutput: {text}" if eos == "<|endoftext|>" else text).encode()
    force(model, 3, [*said, ENDOFTEXT])
    pieces = []

    class Watched(AnswerStreamer):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            pieces.append(capsys.readouterr().out)

    streamer = Watched(tokenizer)
    answer = generate(model, tokenizer, [[1, 2, 3]], make_generation_config(tokenizer, 64), streamer)[0]
    pieces.append(capsys.readouterr().out)
    assert "".join(pieces) == streamer.answer == answer.text == text
    assert "\ufffd" not in "".join(pieces)
    if not text.startswith("\n"):  # held back, because a plain answer may begin so
        assert len([piece for piece in pieces if piece]) == len(text)  # one byte is one token
