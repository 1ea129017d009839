"""verification.py: rounding is told from a wrong merge."""

import math

import pytest
import torch

from finetuning.merging.verification import Comparison

FAR = [9.0] * 40  # how far the base model alone is away, for each token
# differences of tokens, largest logit, prompts, first tokens, answers, margins of other answers, rows
GOOD = {
    "equal": ([0.0] * 40, 20, 8, 8, 8, [], 8),
    "rounded": ([0.01] * 40, 20, 8, 8, 8, [], 8),
    "tie": ([0.01] * 40, 20, 8, 7, 7, [0.03], 8),
}
BAD = {
    "logits": ([0.0] * 37 + [0.1] * 3, 20, 8, 8, 8, [], 8),
    "NaN": ([0.0] * 39 + [math.inf], 20, 8, 8, 8, [], 8),
    "a prompt": ([0.0] * 40, 20, 7, 8, 8, [], 8),
    "answers": ([0.01] * 40, 20, 8, 8, 6, [3.0, 3.0], 8),
}
ROUTING_FLIPS = {
    "a token": ([0.0] * 39 + [0.4], 20, 8, 8, 8, [], 8),
    "its answer": ([0.0] * 39 + [0.4], 20, 8, 8, 7, [3.0], 8),
}


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("numbers", GOOD.values(), ids=GOOD)
def test_rounding_is_good(numbers: tuple, experts: bool, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = Comparison(*numbers, experts, FAR)
    assert comparison.is_good(torch.float32)
    comparison.print("this")
    assert ("the expected token led by 0.03" in capsys.readouterr().out) == (comparison.answers == 7)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("numbers", BAD.values(), ids=BAD)
def test_more_is_bad(numbers: tuple, experts: bool) -> None:
    assert not Comparison(*numbers, experts, FAR).is_good(torch.float32)


@pytest.mark.parametrize("numbers", ROUTING_FLIPS.values(), ids=ROUTING_FLIPS)
def test_rounding_flips_the_routing_to_other_experts(numbers: tuple) -> None:
    assert Comparison(*numbers, True, FAR).is_good(torch.float32) and not Comparison(*numbers, False, FAR).is_good(
        torch.float32
    )


def test_half_precision_rounds_more() -> None:
    numbers = ([0.3], 20, 8, 8, 8, [], 8, False, FAR)
    assert Comparison(*numbers).is_good(torch.bfloat16) and not Comparison(*numbers).is_good(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_light_adapter_that_is_lost(dtype: torch.dtype) -> None:
    """What rounding could explain is still as far away as the base model without its adapter."""
    for difference, good in ((0.01, False), (0.004, False), (0.001, True)):
        assert Comparison([difference] * 40, 20, 8, 8, 8, [], 8, False, [0.01] * 40).is_good(dtype) == good


def test_what_is_not_finite_is_not_good() -> None:
    """Not even if base and adapter are not finite either: nothing is larger than NaN."""
    nothing = Comparison([math.inf], math.nan, 1, 1, 1, [], 1, False, [math.nan])
    assert not nothing.is_good(torch.float32)
