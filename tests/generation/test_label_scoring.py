"""labels.py: each label gets the score of a forward of its own, at a fraction of the cost."""

import os

import pytest
import torch
from support import ENDOFTEXT, IM_END, THINKERS, force, make_model, make_soft, make_tokenizer

from finetuning.generation.generate import make_generation_config
from finetuning.generation.labels import classify_in_batches, encode_label, score_labels
from finetuning.preprocessing.encode import encode, tokenize
from finetuning.preprocessing.templates import set_prompt_format, set_thinking

LABELS = ["good", "goo", "bad", "neither good nor bad", "好", "好的", "?", "\n\n"]
QUESTIONS = ["Is it?", "How was the food there, on the whole?", "a", "判断情感"]


def brute_force(model: torch.nn.Module, prompt: list[int], label: list[int]) -> float:
    """One forward for each label: the sum of its tokens' log-probabilities."""
    virtual = getattr(model, "virtual_tokens", [])
    ids = torch.tensor([virtual + prompt + label])
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double()
    chosen = logits.log_softmax(-1)[-len(label) - 1 : -1]
    return chosen.gather(1, torch.tensor(label).unsqueeze(1)).sum().item()


@pytest.mark.parametrize("eos", ["<|endoftext|>", "<|im_end|>"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text"])
def test_scores_equal_brute_force(model_type: str, soft: bool, eos: str) -> None:
    tokenizer = make_tokenizer(eos)
    set_prompt_format(tokenizer, "auto")
    model = make_soft(model_type) if soft else make_model(model_type)
    prompts = [encode([{"role": "user", "content": text}], tokenizer)[-1]["input_ids"] for text in QUESTIONS]
    labels = [encode_label(label, tokenizer) for label in LABELS]
    expected = torch.tensor([[brute_force(model, prompt, label) for label in labels] for prompt in prompts])
    scores = score_labels(model, prompts, labels, ENDOFTEXT)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)

    choices, config = dict.fromkeys(range(len(prompts))), make_generation_config(tokenizer)
    for numbers, batch in classify_in_batches(model, tokenizer, prompts, [tuple(LABELS)] * len(prompts), 16, config):
        choices |= dict(zip(numbers, batch, strict=True))
    for number, row in enumerate(expected.softmax(1)):
        assert choices[number]["prediction"] == LABELS[row.argmax()]
        for label, probability in zip(LABELS, row.tolist(), strict=True):
            assert choices[number]["probabilities"][label] == pytest.approx(probability, abs=1e-5)


def test_label_is_scored_as_training_writes_it() -> None:
    tokenizer = make_tokenizer()
    set_prompt_format(tokenizer, "auto")
    assert encode_label("yes", tokenizer) == [*b"\nOutput: yes", ENDOFTEXT]


def test_the_prompt_is_read_once() -> None:
    """Eight labels cost one pass over the prompt, and one over what is left of the labels."""
    tokenizer, model, widths = make_tokenizer(), make_model(), []
    set_prompt_format(tokenizer, "auto")
    prompt = encode([{"role": "user", "content": "How was the food there? " * 4}], tokenizer)[-1]["input_ids"]
    labels = [encode_label(label, tokenizer) for label in LABELS]
    model.register_forward_pre_hook(lambda *args: widths.append(args[2]["input_ids"].shape), with_kwargs=True)
    score_labels(model, [prompt], labels, ENDOFTEXT)
    shared = len(os.path.commonprefix(labels))
    assert widths == [(1, len(prompt) + shared), (len(labels), max(map(len, labels)) - shared - 1)]


def test_thinking_models_think_first() -> None:
    """The labels are scored after the model's own thought, and the thought is shown."""
    tokenizer, model = make_tokenizer("<|im_end|>", THINKERS["switch"]), make_model()
    set_prompt_format(tokenizer, "auto")
    set_thinking(tokenizer, True)
    force(model, 3, [*b"<think>\nhm\n</think>\n\nok", ENDOFTEXT])
    config = make_generation_config(tokenizer, 64)
    _, [prediction] = next(classify_in_batches(model, tokenizer, [[1, 2, 3]], [("yes", "no")], 16, config))
    assert prediction["thought"] == "hm"
    (thought,) = tokenize(["<think>\nhm\n</think>\n\n"], tokenizer)
    expected = [brute_force(model, [1, 2, 3, *thought], encode_label(label, tokenizer)) for label in ("yes", "no")]
    difference = torch.tensor(expected).softmax(0)[0].item() - prediction["probabilities"]["yes"]
    assert abs(difference) < 1e-5 and encode_label("yes", tokenizer) == [*b"yes", IM_END]
