"""Prompt tuning: the loss, gradients and answers of rows alone, in every batch (traps 6, 7, 8, 26, 36, 45)."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support import Run, StopAt, make_model, make_tokenizer, save_checkpoint

import inference
import train_prompt_tuning
from train_prompt_tuning import PromptTuningArguments, add_soft_prompt

SEVEN = ["--num_virtual_tokens", "7"]


@pytest.fixture
def run(run_main: Run) -> Run:
    return partial(run_main, train_prompt_tuning)


@pytest.fixture
def flags(flags: list[str]) -> list[str]:
    return [*flags, *SEVEN]


def prompt(folder: Path) -> torch.Tensor:
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


def test_a_run(run: Run, flags: list[str], tmp_path: Path, base_path: str) -> None:
    printed = run(*flags, "--prompt_init_text", "Classify:")
    assert "soft prompt of 7 tokens; the text has 9 and is cut: 'Classif'" in printed
    assert "trainable   224 of" in printed
    out = tmp_path / "out"
    state = load_file(out / "adapter_model.safetensors")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()} == {
        "prompt_embeddings": (torch.Size([7, 32]), torch.float32)
    }
    assert (out / "adapter_model.safetensors").stat().st_size < 7 * 32 * 4 + 200
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PROMPT_TUNING", 7)
    assert not config["tokenizer_name_or_path"]  # trap 36: no second path that breaks when the folder moves
    # a plain PEFT adapter: loads without this repository, and answers as here
    model = PeftModel.from_pretrained(make_model(), str(out)).eval()
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, prompt(out))


@pytest.mark.parametrize(
    ("text", "count", "words", "ids"),
    [
        ("abc", None, "3 tokens; the text has 3 and is used once: 'abc'", b"abc"),
        ("abcde", 3, "3 tokens; the text has 5 and is cut: 'abc'", b"abc"),
        ("ab", 5, "5 tokens; the text has 2 and is repeated: 'ababa'", b"ababa"),
    ],
)
def test_start_from_text(
    text: str, count: int | None, words: str, ids: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trap 8: a text that is cut or repeated gets a message."""
    base = make_model()
    embeddings = base.get_input_embeddings().weight.detach().clone()
    model = add_soft_prompt(base, make_tokenizer(), PromptTuningArguments(count, "TEXT", text))
    assert words in capsys.readouterr().out
    assert torch.equal(model.prompt, embeddings[list(ids)])
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "prompt_encoder.default.embedding.weight"
    ]


@pytest.mark.parametrize("init", ["RANDOM", "SAMPLE_VOCAB"])
def test_other_starts_are_as_large_as_embeddings(init: str) -> None:
    """Trap 7: PEFT's RANDOM is N(0, 1), far from the embeddings."""
    base = make_model()
    spread = base.get_input_embeddings().weight.std().item()
    model = add_soft_prompt(base, make_tokenizer(), PromptTuningArguments(100, init))
    assert model.prompt.std().item() == pytest.approx(spread, rel=0.1)


def test_resumed_run_equals_an_undisturbed_one(
    run: Run, flags: list[str], trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traps 17 and 45: PEFT would refuse to load a prompt for training."""
    flags = [*flags, "--save_steps", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("common.StopOnSignal", lambda: StopAt(3))
        with pytest.raises(KeyboardInterrupt):
            run(*flags)
    message = run(*flags, "--resume_from_checkpoint", "True", "--num_virtual_tokens", 6, expected=2)
    assert "num_virtual_tokens 7, not 6" in message
    run(*flags, "--resume_from_checkpoint", "True")
    assert torch.equal(prompt(tmp_path / "out"), prompt(trained(train_prompt_tuning, *SEVEN)))


def test_evaluation_and_best_checkpoint(run: Run, flags: list[str], rows_path: str, tmp_path: Path) -> None:
    """Trap 26: the logits of an evaluation line up with its labels; the best checkpoint is what is saved."""
    strategy = (
        "--eval_strategy steps --eval_steps 2 --save_steps 2 --load_best_model_at_end True --keep_checkpoints True"
    )
    printed = run(*flags, "--eval_data_path", rows_path, *strategy.split(), "--learning_rate", 5)
    assert printed.count("  evaluation, ") == 3
    out = tmp_path / "out"
    state = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text(encoding="utf-8"))
    best = Path(state["best_model_checkpoint"])
    assert torch.equal(prompt(best), prompt(out))
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    assert best.name == f"checkpoint-{min(losses, key=losses.get)}"


def test_4bit_and_gradient_checkpointing(run: Run, flags: list[str], tmp_path: Path) -> None:
    """Trap 45: a frozen 4-bit base still passes the gradient on to the prompt."""
    path = save_checkpoint(tmp_path / "model", make_tokenizer(), make_model(hidden_size=64, head_dim=16))
    flags = [*flags, "--model_path", path, "--load_in_4bit", "True"]
    run(*flags)
    run(*flags, "--gradient_checkpointing", "True", "--output_dir", tmp_path / "checkpointed")
    torch.testing.assert_close(prompt(tmp_path / "out"), prompt(tmp_path / "checkpointed"), rtol=0, atol=1e-5)


def test_inference_with_the_saved_prompt(
    run: Run, flags: list[str], tmp_path: Path, rows_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(*flags, "--learning_rate", 1)
    predictions = []
    for batch_size in ("1", "5"):
        file = tmp_path / f"{batch_size}.jsonl"
        words = ["inference.py", "--adapter_path", str(tmp_path / "out"), "--data_path", rows_path]
        words += ["--output_file", str(file), "--batch_size", batch_size, "--max_new_tokens", "8"]
        monkeypatch.setattr("sys.argv", words)
        inference.main()
        predictions.append(file.read_text(encoding="utf-8"))
    assert predictions[0] == predictions[1]


BAD_FLAGS = {
    "no tokens": (["--num_virtual_tokens", "0"], ["--num_virtual_tokens"]),
    "too many tokens": (["--num_virtual_tokens", "512"], ["--num_virtual_tokens 512", "512 positions"]),
    "empty text": (["--prompt_init_text", ""], ["--prompt_init_text"]),
    "unknown init": (["--prompt_tuning_init", "TXET"], ["--prompt_tuning_init", "TXET", "RANDOM"]),
    "lower case init": (["--prompt_tuning_init", "text"], ["--prompt_tuning_init", "TEXT"]),
    "label smoothing": (["--label_smoothing_factor", "0.1"], ["--label_smoothing_factor"]),
    "a flag of the other script": (["--lora_r", "8"], ["--lora_r"]),
}


@pytest.mark.parametrize(("words", "parts"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_mistakes(run: Run, flags: list[str], tmp_path: Path, words: list[str], parts: list[str]) -> None:
    message = run(*flags, *words, expected=2)
    for part in parts:
        assert part in message
    assert not (tmp_path / "out").exists()
