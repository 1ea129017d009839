"""inference.py: a saved adapter answers as it was trained, or says why it can not."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ENDOFTEXT, IM_END, make_model, make_tokenizer, save_checkpoint
from safetensors.torch import load_file, save_file
from transformers import LogitsProcessor, LogitsProcessorList

import inference
import train_lora
from adapters import base_fingerprint, compare_fingerprints
from prompts import encode_messages, set_prompt_format

Run = Callable[..., str]


def train(monkeypatch: pytest.MonkeyPatch, model_path: str, rows_path: str, out: Path, *flags: object) -> str:
    words = f"--model_path {model_path} --data_path {rows_path} --output_dir {out} --max_steps 2 --disable_tqdm True"
    monkeypatch.setattr("sys.argv", ["train_lora.py", *words.split(), *map(str, flags)])
    train_lora.main()
    return str(out)


@pytest.fixture(scope="module")
def adapter_path(base_path: str, rows_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        out = tmp_path_factory.mktemp("adapter") / "out"
        return train(patch, base_path, rows_path, out, "--learning_rate", 0.05, "--max_steps", 6)


@pytest.fixture
def run(run_main: Run) -> Run:
    return partial(run_main, inference, "--max_new_tokens", 8)


def test_one_instruction(run: Run, adapter_path: str) -> None:
    """The base model is the one that the adapter names."""
    printed = run("--adapter_path", adapter_path, "--instruction", "Say sun")
    assert len(printed) > 1  # the answer, and nothing but the answer
    assert "Output" not in printed and "prompt" not in printed
    assert run("--adapter_path", adapter_path, "--instruction", "Say sun") == printed


def test_batches_answer_as_single_rows(run: Run, adapter_path: str, rows_path: str, tmp_path: Path) -> None:
    outputs = []
    for batch_size in (1, 5, 16):
        file = tmp_path / f"{batch_size}.jsonl"
        flags = ["--adapter_path", adapter_path, "--data_path", rows_path, "--output_file", file]
        printed = run(*flags, "--batch_size", batch_size)
        outputs.append([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])
        assert "| rows | 12 |" in printed
    rows = json.loads(Path(rows_path).read_text(encoding="utf-8"))
    assert [{name: row[name] for name in rows[0]} for row in outputs[0]] == rows  # in the file's order
    assert outputs[0] == outputs[1] == outputs[2]
    assert len({row["prediction"] for row in outputs[0]}) > 1


class Force(LogitsProcessor):
    """Makes the model say some tokens in turn."""

    def __init__(self, start: int, tokens: list[int]) -> None:
        self.start, self.tokens = start, tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:] = -torch.inf
        scores[:, self.tokens[input_ids.shape[1] - self.start]] = 0
        return scores


@pytest.mark.parametrize("stop", [ENDOFTEXT, IM_END])
def test_both_stop_tokens_end_an_answer(stop: int) -> None:
    """Trap 2: the model's own generation configuration names <|endoftext|> alone."""
    model, tokenizer = make_model(), make_tokenizer()
    set_prompt_format(tokenizer, "auto")
    prompt = encode_messages([{"role": "user", "content": "a"}], tokenizer)[0]
    assert model.generation_config.eos_token_id == ENDOFTEXT
    generate = model.generate
    forced = LogitsProcessorList([Force(len(prompt), [*b"\nOutput: ok", stop, *b"never"])])
    outputs = []
    model.generate = lambda **kwargs: outputs.append(generate(**kwargs, logits_processor=forced)) or outputs[-1]
    answers, cut = inference.generate(model, tokenizer, [prompt], max_new_tokens=16)
    assert (answers, cut) == (["ok"], 0)
    assert outputs[0][0, len(prompt) :].tolist() == [*b"\nOutput: ok", stop]  # nothing was generated behind it
    assert inference.generate(model, tokenizer, [prompt], max_new_tokens=5)[1] == 1


def test_answers_are_greedy_even_where_the_model_asks_for_sampling() -> None:
    """Trap 46: Instruct models come with do_sample=True."""
    model, tokenizer = make_model(), make_tokenizer()
    set_prompt_format(tokenizer, "auto")
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    answers = {inference.generate(model, tokenizer, [[1, 2, 3]], max_new_tokens=8)[0][0] for _ in range(5)}
    assert len(answers) == 1


def test_checkpointing_and_dropout_are_off(adapter_path: str, base_path: str) -> None:
    """Trap 16."""
    from arguments import ModelArguments

    model, _ = inference.load_for_inference(ModelArguments(model_path=None, load_in_4bit=None), adapter_path)
    assert not any(module.training for module in model.modules())
    assert not model.get_base_model().is_gradient_checkpointing


# ---- traps 10, 35, 36, 42: the wrong adapter, the wrong base


def test_other_bases_are_refused(run: Run, adapter_path: str, tmp_path: Path) -> None:
    """Trap 10: all of these load in PEFT without a word."""
    others = {
        "other weights": make_model(seed=1),
        "model_type": make_model("qwen3", attention_bias=True),
        "num_hidden_layers is 3, and was 2": make_model(num_hidden_layers=3),
    }
    for number, (words, model) in enumerate(others.items()):
        path = save_checkpoint(tmp_path / str(number), make_tokenizer(), model)
        message = run("--adapter_path", adapter_path, "--model_path", path, "--instruction", "a", expected=2)
        assert words in message and "--model_path" in message
    fine_tuned = make_model()
    fine_tuned.model.layers[1].input_layernorm.weight.data += 0.01  # same embeddings, as an instruct version has
    path = save_checkpoint(tmp_path / "close", make_tokenizer(), fine_tuned)
    assert "other weights" in run(
        "--adapter_path", adapter_path, "--model_path", path, "--instruction", "a", expected=2
    )


def test_same_base_in_another_dtype_is_accepted() -> None:
    """Trained in half precision on a GPU, used in float32 on a CPU."""
    model = make_model().to(torch.bfloat16)  # as Qwen's checkpoints are stored
    prints = [base_fingerprint(model.to(dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float16)]
    assert all(compare_fingerprints(saved, found) is None for saved in prints for found in prints)
    other = base_fingerprint(make_model(seed=1))
    assert all(compare_fingerprints(saved, other) for saved in prints)


def test_other_quantisation_gives_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rows_path: str, tmp_path: Path
) -> None:
    model = save_checkpoint(tmp_path / "model", make_tokenizer(), make_model(hidden_size=64, head_dim=16))
    adapter = train(monkeypatch, model, rows_path, tmp_path / "out", "--load_in_4bit", True)
    for flags, warned in (([], False), (["--load_in_4bit", "False"], True), (["--load_in_4bit", "True"], False)):
        words = ["inference.py", "--adapter_path", adapter, "--instruction", "a", "--max_new_tokens", "2", *flags]
        monkeypatch.setattr("sys.argv", words)
        capsys.readouterr()
        inference.main()
        assert ("was trained on a base model in 4-bit" in capsys.readouterr().err) == warned


def copy(adapter_path: str, folder: Path) -> Path:
    folder.mkdir()
    for path in Path(adapter_path).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_incomplete_adapter(run: Run, adapter_path: str, tmp_path: Path, missing: str) -> None:
    folder = copy(adapter_path, tmp_path / "copy")
    (folder / missing).unlink()
    (folder / "adapter_model.bin").write_bytes(b"a pickle, which is never opened")  # trap 42
    message = run("--adapter_path", folder, "--instruction", "a", expected=2)
    assert str(folder) in message and missing in message


def test_missing_adapter_and_missing_base(run: Run, adapter_path: str, tmp_path: Path) -> None:
    """Traps 35 and 36: no look-up of a mistyped path on the hub."""
    assert "does not exist" in run("--adapter_path", tmp_path / "no", "--instruction", "a", expected=2)
    folder = copy(adapter_path, tmp_path / "copy")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(tmp_path / "moved" / "model")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    message = run("--adapter_path", folder, "--instruction", "a", expected=2)
    assert "--model_path" in message and "moved" in message


def test_adapter_with_nan_or_of_another_shape(run: Run, adapter_path: str, tmp_path: Path) -> None:
    folder = copy(adapter_path, tmp_path / "nan")
    state = load_file(folder / "adapter_model.safetensors")
    name = next(iter(state))
    save_file(state | {name: state[name] * float("nan")}, folder / "adapter_model.safetensors")
    assert "NaN" in run("--adapter_path", folder, "--instruction", "a", expected=2)
    save_file(state | {name: state[name][:, :4].contiguous()}, folder / "adapter_model.safetensors")
    message = run("--adapter_path", folder, "--instruction", "a", expected=2)
    assert "does not fit" in message and "size mismatch" in message
    (folder / "adapter_model.safetensors").write_bytes(b"junk")
    assert "adapter_model.safetensors" in run("--adapter_path", folder, "--instruction", "a", expected=2)


def test_mistakes(run: Run, adapter_path: str, rows_path: str, tmp_path: Path) -> None:
    flags = ["--adapter_path", adapter_path]
    assert "--data_path" in run(*flags, "--instruction", "a", "--data_path", rows_path, expected=2)
    assert "--data_path" in run(*flags, "--output_file", tmp_path / "out.jsonl", expected=2)
    assert "--batch_size" in run(*flags, "--batch_size", 0, expected=2)
    assert "--tasks" in run(*flags, "--data_path", rows_path, "--tasks", "none", expected=2)
    taken = tmp_path / "taken.jsonl"
    taken.write_text("mine", encoding="utf-8")
    message = run(*flags, "--data_path", rows_path, "--output_file", taken, expected=2)
    assert "taken.jsonl" in message and taken.read_text(encoding="utf-8") == "mine"


def test_conversations_and_rows_without_answers(run: Run, adapter_path: str, tmp_path: Path) -> None:
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"instruction": "a"}), encoding="utf-8")
    printed = run("--adapter_path", adapter_path, "--data_path", path)
    assert printed.count('"prediction"') == 2 and "exact match" not in printed


def test_answers_do_not_need_the_scorer(
    run: Run, adapter_path: str, rows_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contract's pip command does not install sacrebleu."""
    monkeypatch.setattr("inference.find_spec", lambda name: None)
    printed = run("--adapter_path", adapter_path, "--data_path", rows_path)
    assert printed.count('"prediction"') == 12 and "exact match" not in printed
