"""memory.py: what a step needs, worked out by hand. `tests/peaks.py` compares it with what steps take on a machine."""

import pytest
from peft import LoraConfig, get_peft_model
from support import make_model

from finetuning.training import memory
from finetuning.training.memory import NF4, Size, compute_step, measure_size

SIZE = Size(layers=4, layer=100, matrices=80, largest=30, hidden=10, vocab_size=100)


def test_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compute_step(SIZE, kept=12, tokens=10, trained=7)
    assert whole.weights == 2 * (4 * 100 + 2 * 1000) and whole.training == 16 * 7 and whole.activations == 120
    assert whole.logits == 1.5 * 4 * 100 * 10 and whole.unpacked == 0
    assert whole.total() == whole.weights + 112 + 120 + whole.logits
    part = compute_step(SIZE, kept=0, tokens=10, trained=0, gpus=8)
    # two layers and lm_head are gathered while they work
    assert part.weights == whole.weights / 8 and part.unpacked == 2 * 200 + 2000
    assert compute_step(SIZE._replace(tied=True), 0, 10, 0).weights == 2 * (4 * 100 + 1000)
    packed = compute_step(SIZE, kept=0, tokens=10, trained=0, in_4bit=True)
    assert packed.weights == pytest.approx(4 * (80 * 0.5159 + 20 * 2) + 4000, rel=1e-4) and packed.unpacked == 60
    # one of four layers, and the inputs of all: 10 numbers of 2 bytes
    assert compute_step(SIZE, 12, 10, 0, checkpointing=True).activations == 12 * 10 / 4 + 4 * 10 * 2 * 10
    assert compute_step(SIZE, 12, 10, 0, checkpointing=True, offload=True).activations == 12 * 10 / 4
    assert compute_step(SIZE._replace(width=4), 0, 10, 0).logits == 4 * 100 * 10
    monkeypatch.setattr(memory, "LOGITS_MEMORY", 800)  # a chunk
    assert compute_step(SIZE, 0, 10, 0).logits == 1200


def test_the_adapter_is_not_among_the_weights() -> None:
    """Of the layers, 4 bits reach the matrices: neither LoRA's own, nor the vocabulary, nor norms and biases."""
    base = make_model(tie_word_embeddings=False)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    size = measure_size(model.get_base_model())
    matrices = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64  # q and o, k and v, MLP
    assert size == Size(2, matrices + 32 + 16 + 16 + 2 * 32, matrices, 32 * 64, 32, 264, tied=False, width=4)
    saved = compute_step(size, 0, 0, 0).weights - compute_step(size, 0, 0, 0, in_4bit=True).weights
    assert saved == pytest.approx(2 * matrices * (4 - NF4))
