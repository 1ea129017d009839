"""What the backward pass keeps at the shape of a 7B model: the row of the memory arithmetic, from its command."""

import pytest
from support import Run

from benchmarking import kept_bytes
from benchmarking.kept_bytes import KIB, per_token_and_layer


def test_the_command(run_main: Run) -> None:
    printed = run_main(kept_bytes, "--shape", "qwen2.5-7b")
    assert "LoRA on q, k, v   186.7, with checkpointing   7.0" in printed
    assert "prompt tuning     155.1, with checkpointing   7.0" in printed


@pytest.mark.parametrize("cast_inputs", [True, False])
def test_lora_keeps_little(cast_inputs: bool) -> None:
    """PEFT's cast keeps nothing, because autocast undoes it at once: it costs time, and memory for a moment."""
    assert per_token_and_layer("qwen2.5-7b", "lora", cast_inputs=cast_inputs) <= 190 * KIB
