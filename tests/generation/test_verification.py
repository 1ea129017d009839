"""verification.py: rounding is told from a wrong merge."""

import math

import pytest
import torch

from finetuning.generation.verification import Comparison

# difference, largest logit, prompts, first tokens, answers, lead where answers part, rows
GOOD = {
    "equal": (0.0, 20, 8, 8, 8, 0.0, 8),
    "rounded": (0.01, 20, 8, 8, 8, 0.0, 8),
    "tie": (0.01, 20, 8, 7, 7, 0.03, 8),
}
BAD = {
    "logits": (0.1, 20, 8, 8, 8, 0.0, 8),
    "NaN": (math.inf, 20, 8, 8, 8, 0.0, 8),
    "a prompt": (0.0, 20, 7, 8, 8, 0.0, 8),
    "an answer": (0.01, 20, 8, 8, 7, 3.0, 8),
}


@pytest.mark.parametrize("numbers", GOOD.values(), ids=GOOD)
def test_rounding_is_good(numbers: tuple[float, ...], capsys: pytest.CaptureFixture[str]) -> None:
    comparison = Comparison(*numbers)
    assert comparison.is_good(torch.float32)
    comparison.print("this")
    assert ("the expected token led by 0.03" in capsys.readouterr().out) == (comparison.answers == 7)


@pytest.mark.parametrize("numbers", BAD.values(), ids=BAD)
def test_more_is_bad(numbers: tuple[float, ...]) -> None:
    assert not Comparison(*numbers).is_good(torch.float32)


def test_half_precision_rounds_more() -> None:
    numbers = (0.3, 20, 8, 8, 8, 0.0, 8)
    assert Comparison(*numbers).is_good(torch.bfloat16) and not Comparison(*numbers).is_good(torch.float32)
