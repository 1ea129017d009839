"""train_lora.py from the command line: what it trains, saves, refuses and resumes."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from support import (
    SHORT,
    STEP,
    Run,
    StopAt,
    adapter_weights,
    equal_weights,
    make_model,
    make_tokenizer,
    preprocess,
    save_checkpoint,
    six_steps,
)
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import inference
import train_lora
import train_prompt_tuning
from common import load_model, load_tokenizer
from finetuning.cli.arguments import ModelArguments
from finetuning.generation import evaluate
from finetuning.model import hub
from finetuning.model.folder import adapter_state, save_adapter
from finetuning.model.lora import add_lora
from finetuning.training import checkpoints
from finetuning.training.collators import FlattenCollator, PadCollator
from finetuning.training.flags import parse_arguments
from finetuning.training.trainer import make_trainer, prepare_adapter


@pytest.fixture
def run(run_main: Run) -> Run:
    return partial(run_main, train_lora)


def test_a_run(run: Run, flags: list[str], tmp_path: Path) -> None:
    printed = run(*flags, "--learning_rate", 0.03)
    for words in [
        "float32 (no GPU; half precision",
        "plain; the first row",
        "12 rows, all kept",
        "2 of 2 layers",
        "2,560 of ",
        r"reads  'Instruction: Say sun'",
        r"writes '\nOutput: sun<|endoftext|>'",
        "tokens/s, peak memory",
        f"python inference.py --adapter_path {tmp_path / 'out'}",
    ]:
        assert words in printed
    losses = [float(loss) for loss in STEP.findall(printed)]
    assert losses[-1] < losses[0]


def test_adapter_folder_holds_the_adapter_and_little_else(run: Run, flags: list[str], tmp_path: Path) -> None:
    run(*flags, "--save_steps", 2)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_info.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "loss.png",
        "training_report.json",
    ]
    weights = adapter_weights(out)
    assert all("lora_" in name and tensor.dtype == torch.float32 for name, tensor in weights.items())
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    assert sum(path.stat().st_size for path in out.iterdir()) < size + 1e6
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 32, 0.05)
    assert sorted(config["target_modules"]) == ["k_proj", "q_proj", "v_proj"]
    info = json.loads((out / "adapter_info.json").read_text(encoding="utf-8"))
    assert info["prompt_format"] == "plain" and info["quantization"] is None and info["stop_token_ids"] == [257, 259]


@pytest.mark.parametrize("script", [train_lora, train_prompt_tuning])
def test_rows_can_be_looked_at_first(
    run_main: Run, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: ModuleType
) -> None:
    """No model is loaded, nothing is written or created on the hub, and a used output folder does not matter."""
    for name in ("load_model", "train"):
        monkeypatch.setattr(script, name, Mock(side_effect=AssertionError))
    monkeypatch.setattr(hub, "create_repo", Mock(side_effect=AssertionError))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine", encoding="utf-8")
    printed = run_main(script, *flags, "--show_rows", 2, "--push_to_hub", True)
    assert printed.count("\nrow ") == 2 and r"writes '\nOutput: sun<|endoftext|>'" in printed
    assert "'<|endoftext|>' 257" in printed and len(list((tmp_path / "out").iterdir())) == 1
    assert run_main(script, *flags, "--show_rows", 50).count("\nrow ") == 12
    assert "--show_rows" in run_main(script, *flags, "--show_rows", -1, expected=2)


def test_two_runs_are_equal(
    run: Run, flags: list[str], trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 21: the seed is set before the adapter is made, also if nothing has set it while the flags were tried."""
    monkeypatch.setattr("finetuning.training.flags.try_out", Mock())
    run(*flags)
    assert equal_weights(tmp_path / "out", trained(train_lora))
    assert not equal_weights(tmp_path / "out", trained(train_lora, "--seed", 1))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_loss_equals_the_stock_trainer(
    base_path: str, rows_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    """Step by step, against padding and DataCollatorForSeq2Seq; trap 20: also with gradient accumulation."""
    tokenizer = load_tokenizer(ModelArguments(model_path=base_path), "auto")
    dataset = preprocess(rows_path, tokenizer, 512).dataset
    sdpa = Mock(side_effect=torch.nn.functional.scaled_dot_product_attention)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
    losses = []
    for ours in (False, True):
        sdpa.reset_mock()
        torch.manual_seed(0)
        model = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
        arguments = TrainingArguments(
            str(tmp_path / str(ours)),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-2,
            max_steps=8,
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=not ours,
        )
        if ours:
            trainer = make_trainer(model, tokenizer.pad_token_id, arguments, dataset)
        else:
            trainer = Trainer(model, arguments, train_dataset=dataset, data_collator=DataCollatorForSeq2Seq(tokenizer))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[1]) == 8 and losses[1][-1] < losses[1][0] - 0.1
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert sdpa.call_count == 8 * accumulation * 2 * 2  # batches, layers, rows: each row attends by itself


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text"])
def test_other_architectures(run: Run, flags: list[str], tmp_path: Path, model_type: str) -> None:
    """Trap 27: on hybrid Qwens the default modules reach one layer of four, and the run says so."""
    path = save_checkpoint(tmp_path / "model", make_tokenizer("<|im_end|>"), make_model(model_type))
    printed = run(*flags, "--model_path", path, "--max_steps", 2)
    assert "format      chat" in printed
    if model_type.startswith("qwen3_"):
        assert ("linear_attn 0 of 3 layers" in printed) == (model_type != "qwen3_moe")
        assert ("mlp.experts 0 of 2 layers" in printed) == (model_type == "qwen3_moe")
    if model_type == "qwen3_5_text":
        assert "add to --target_modules: in_proj_qkv,in_proj_z,out_proj" in printed
        more = "q_proj,k_proj,v_proj,in_proj_qkv,in_proj_z,out_proj"
        out = tmp_path / "more"
        printed = run(*flags, "--model_path", path, "--max_steps", 2, "--target_modules", more, "--output_dir", out)
        assert "adapted     linear_attn 3 of 3 layers, mlp 0 of 4 layers, self_attn 1 of 1 layers\n" in printed


def test_samples_of_masked_answers(run: Run, flags: list[str], tmp_path: Path) -> None:
    """The right answer is the last that is supervised, and not what comes after it."""
    turns = [("user", "q one"), ("assistant", "good"), ("user", "q two"), ("assistant", "BAD")]
    messages = [{"role": role, "content": text} for role, text in turns]
    messages[-1]["weight"] = 0
    path = tmp_path / "masked.json"
    path.write_text(json.dumps([{"messages": messages}] * 2))
    printed = run(*flags, "--data_path", path, "--max_steps", 1, "--sample_answers", 1)
    assert "  right     'good'\n" in printed and "\nrow 1       'Instruction: q one'\n" in printed


@pytest.mark.parametrize(
    ("model_type", "names", "words"),
    [
        (
            "qwen2_moe",
            "all-linear",
            "mlp.experts 0 of 2 layers, mlp.shared_expert 2 of 2 layers",
        ),
        ("qwen3_5_moe_text", "gate_proj,up_proj", "linear_attn 0 of 3 layers, mlp.gate 0 of 4 layers, mlp.experts 0"),
        ("qwen3_next", "all-linear", "linear_attn 3 of 3 layers"),  # as far as PEFT can
        ("qwen3_next", "q_proj,gate_proj,up_proj", "PEFT does not adapt gate_proj, up_proj of this model"),
        ("mixed", "q_proj,gate_proj,up_proj", "lora.ParamWrapper does not work with lora_dropout != 0"),
    ],
)
def test_what_is_adapted(
    model_type: str, names: str, words: str, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """Trap 93: which experts a name reaches depends on the family, as PEFT sees it."""
    layers = {"mlp_only_layers": [0]} if model_type == "mixed" else {}
    model = make_model("qwen3_moe" if model_type == "mixed" else model_type, **layers)
    with nullcontext() if "layers" in words else pytest.raises(SystemExit):
        add_lora(model, train_lora.build_lora_config(train_lora.LoraArguments(target_modules=names), model))
    assert words in "".join(capsys.readouterr())


def test_4bit(run: Run, flags: list[str], tmp_path: Path) -> None:
    """NF4 with double quantisation; also with gradient checkpointing; nothing but the adapter is saved."""
    path = save_checkpoint(tmp_path / "model", make_tokenizer(), make_model(hidden_size=64, head_dim=16))
    run(*flags, "--model_path", path, "--load_in_4bit", True, "--gradient_checkpointing", True)
    info = json.loads((tmp_path / "out" / "adapter_info.json").read_text(encoding="utf-8"))
    assert info["quantization"] == "nf4"
    assert all(
        "lora_" in name and tensor.dtype == torch.float32 for name, tensor in adapter_weights(tmp_path / "out").items()
    )


def test_4bit_model_is_nf4_and_the_rest_is_left_alone(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model", make_tokenizer(), make_model(hidden_size=64, head_dim=16))
    model = load_model(ModelArguments(model_path=path, load_in_4bit=True), torch.float32, torch.device("cpu"))
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, Linear4bit)
    assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
    assert not isinstance(model.lm_head, Linear4bit) and model.lm_head.weight.dtype == torch.float32


def test_gradient_checkpointing_changes_nothing(trained: Callable[..., Path]) -> None:
    """Trap 5: under reentrant checkpointing a frozen base gives the adapter no gradient."""
    more = ["--lora_dropout", 0]
    first = adapter_weights(trained(train_lora, *more))
    second = adapter_weights(trained(train_lora, *more, "--gradient_checkpointing", True))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-6)


def test_evaluation_during_training(run: Run, flags: list[str], rows_path: str, tmp_path: Path) -> None:
    printed = run(*flags, "--eval_data_path", rows_path, "--eval_strategy", "steps", "--eval_steps", 3)
    assert printed.count("  evaluation, ") == 2
    assert run(*flags, "--output_dir", tmp_path / "two", "--eval_data_path", rows_path).count("  evaluation, ") == 2
    printed = run(*flags, "--output_dir", tmp_path / "no", "--eval_data_path", rows_path, "--eval_strategy", "no")
    assert "  evaluation, " not in printed and "| rows |   12 | " in printed


def test_each_evaluation_has_its_checkpoint(run: Run, flags: list[str], rows_path: str, tmp_path: Path) -> None:
    """Or the best one is evaluated, but never saved, and the last one comes out instead without a word."""
    best = ["--eval_data_path", rows_path, "--load_best_model_at_end", "True", "--eval_strategy", "steps"]
    run(*flags, *best, "--eval_steps", 3, "--eval_metrics", False, "--keep_checkpoints", True)
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}


def test_metrics_at_the_end(run: Run, run_main: Run, flags: list[str], rows_path: str, tmp_path: Path) -> None:
    """The scores of the saved adapter: those that inference.py gives, with dropout and checkpointing off (trap 16)."""
    flags = [*flags, "--eval_data_path", rows_path, "--load_best_model_at_end", "True", "--learning_rate", "0.05"]
    flags += ["--gradient_checkpointing", "True", "--lora_dropout", "0.5"]
    flags += ["--eval_strategy", "steps", "--eval_steps", "4", "--save_steps", "4"]  # the last steps are of training
    printed = run(*flags)
    assert "| rows |   12 | " in printed
    own = json.loads((tmp_path / "out/metrics.json").read_text(encoding="utf-8"))
    words = f"--adapter_path {tmp_path}/out --data_path {rows_path} --output_file {tmp_path}/answers.jsonl"
    run_main(inference, *words.split(), "--max_new_tokens", SHORT)
    assert json.loads((tmp_path / "answers.metrics.json").read_text(encoding="utf-8"))["scores"] == own["scores"]
    run(*flags, "--overwrite_output_dir", True, "--eval_metrics", False)
    assert not (tmp_path / "out/metrics.json").exists()  # it would speak of another adapter


def test_rows_held_out_are_evaluated_on_and_not_trained_on(
    run: Run, flags: list[str], rows_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, answered = set(), []
    collate, answer = FlattenCollator.__call__, evaluate.answer_rows

    def look(self: FlattenCollator, rows: list[dict[str, Any]]) -> dict[str, Any]:
        trained.update(row["row_number"] for row in rows if "row_number" in row)  # others count memory
        return collate(self, rows)

    monkeypatch.setattr(FlattenCollator, "__call__", look)
    monkeypatch.setattr(
        "finetuning.generation.evaluate.answer_rows",
        lambda *args, **names: answered.extend(args[2]) or answer(*args, **names),
    )
    printed = run(*flags, "--max_rows", 10, "--eval_split", 0.3, "--eval_strategy", "no", "--num_train_epochs", 1)
    rows = json.loads(Path(rows_path).read_text(encoding="utf-8"))[:10]
    assert "10 rows" in printed and "| rows |    3 | " in printed and len(trained) == 7
    kept = [row["instruction"] for number, row in enumerate(rows, 1) if number not in trained]
    assert [row["instruction"] for row in answered] == kept


def test_nothing_trained_is_an_error(run: Run, flags: list[str], tmp_path: Path) -> None:
    """Trap 5, after the fact: an adapter equal to its start is not saved. The first step of a warm-up has rate 0."""
    assert "changed nothing" in run(*flags, "--max_steps", 1, "--warmup_steps", 10, expected=1)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_not_finite_stops_the_run(run: Run, flags: list[str], tmp_path: Path) -> None:
    """Trap 4: the Trainer would log 0.0, exit with 0 and save NaN."""
    model = make_model()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("inf")
    path = save_checkpoint(tmp_path / "broken", make_tokenizer(), model)
    message = run(*flags, "--model_path", path, "--save_steps", 1, expected=1)
    assert "step 1" in message and "loss is nan" in message and "--learning_rate" in message
    assert not list((tmp_path / "out").iterdir())
    assert "is" in run(*flags, "--learning_rate", "1e38", "--max_grad_norm", 0, "--save_steps", 1, expected=1)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("script", [train_lora, train_prompt_tuning])
def test_learning_rate_of_a_million(run_main: Run, flags: list[str], tmp_path: Path, script: ModuleType) -> None:
    """A prompt only grows: normalisation hides it from the loss, and its gradient vanishes."""
    message = run_main(script, *flags, "--learning_rate", "1e6", expected=1)
    assert "--learning_rate" in message
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_5_text"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_rows_that_are_not_finite_are_named(
    run: Run, flags: list[str], rows_path: str, tmp_path: Path, model_type: str, accumulation: int
) -> None:
    """Trap 4: the step and the rows of the batch that the first bad loss came from, flattened and padded."""
    model = make_model(model_type, tie_word_embeddings=False)
    model.get_input_embeddings().weight.data[ord("X")] = float("nan")
    path = save_checkpoint(tmp_path / "broken", make_tokenizer(), model)
    rows = json.loads(Path(rows_path).read_text(encoding="utf-8"))
    rows[6]["instruction"] = "Say X"
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    more = f"--train_sampling_strategy sequential --logging_steps 50 --gradient_accumulation_steps {accumulation}"
    more += f" --logging_first_step False --per_device_train_batch_size 2 --model_path {path} --data_path {data}"
    message = run(*flags, *more.split(), expected=1)
    step = 4 if accumulation == 1 else 2
    assert f"step {step} (rows 7, 8 of the data file): loss is nan" in message


def test_code_of_a_checkpoint_is_not_run(run: Run, flags: list[str], base_path: str, tmp_path: Path) -> None:
    """Trap 43: unless --trust_remote_code True says so."""
    path = tmp_path / "model"
    shutil.copytree(base_path, path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    assert "trust_remote_code" in run(*flags, "--model_path", path, expected=2)
    assert not (tmp_path / "ran").exists()


def test_padded_vocabulary_keeps_its_size(run: Run, flags: list[str], tmp_path: Path) -> None:
    """Trap 47: Qwen's embeddings have more rows than its tokenizer has tokens, and an adapter must fit them."""
    path = save_checkpoint(tmp_path / "padded", make_tokenizer(), make_model(vocab_size=300))
    run(*flags, "--model_path", path)
    info = json.loads((tmp_path / "out/adapter_info.json").read_text(encoding="utf-8"))
    assert info["base_fingerprint"]["config"]["vocab_size"] == 300


def test_evaluation_rows_without_an_answer(run: Run, flags: list[str], tmp_path: Path) -> None:
    """Trap 18: an evaluation of nothing would have no best checkpoint."""
    data = tmp_path / "eval.json"
    data.write_text('[{"instruction": "' + "long " * 50 + '", "output": "a"}]', encoding="utf-8")
    message = run(*flags, "--eval_data_path", data, "--max_length", 40, expected=2)
    assert "eval.json: no row is left" in message


def test_precision_without_cuda(base_path: str) -> None:
    """Traps 23, 30, 31: without a GPU everything is float32, and the flags that ask for more do no harm."""
    for words in ([], ["--fp16", "True"], ["--bf16", "True"]):
        args = parse_arguments(
            train_lora.LoraArguments, None, ["--model_path", base_path, "--output_dir", "out", *words]
        )
        assert not args.training.fp16 and not args.training.bf16
        assert args.dtype == torch.float32
    # a half-precision base, as on a GPU: what trains is float32 all the same
    model = load_model(args.model, torch.float16, torch.device("cpu"))
    model = get_peft_model(model, train_lora.build_lora_config(args.method, model), autocast_adapter_dtype=False)
    prepare_adapter(model)
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.float16)}


def test_defaults_are_set_and_not_inherited(tmp_path: Path) -> None:
    """Trap 33: transformers 5 takes the checkpoint's dtype and logs every 500 steps."""
    path = save_checkpoint(tmp_path / "half", make_tokenizer(), make_model().half())
    args = parse_arguments(train_lora.LoraArguments, None, ["--model_path", path, "--output_dir", "out"])
    assert load_model(args.model, args.dtype, torch.device("cpu")).dtype == torch.float32
    assert args.training.logging_steps == 10 and args.training.logging_first_step
    assert args.training.report_to == []


def test_one_process_uses_one_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Trap 19: the Trainer would wrap the model in DataParallel. `_n_gpu` is private: is it still what counts?"""
    library = TrainingArguments(use_cpu=True)
    library._n_gpu = 7
    assert library.n_gpu == 7
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: getattr(self, "_n_gpu", 4)))
    monkeypatch.setattr(TrainingArguments, "_setup_devices", torch.device("cpu"))
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: setattr(self, "report_to", []))
    monkeypatch.setattr("finetuning.training.flags.try_out", Mock())
    assert parse_arguments(train_lora.LoraArguments, None, ["--output_dir", "out"]).training.n_gpu == 1
    assert "torchrun" in capsys.readouterr().out


# ---- resuming (trap 17)


STEPWISE = ["--save_steps", "1", "--logging_steps", "1"]


@pytest.fixture(scope="module")
def stopped(base_path: str, rows_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped after three of six steps."""
    folder = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("common.StopOnSignal", lambda: StopAt(3))
        patch.setattr("sys.argv", ["train_lora.py", *six_steps(base_path, rows_path, folder), *STEPWISE])
        train_lora.main()
    return folder


@pytest.fixture
def interrupted(flags: list[str], stopped: Path, tmp_path: Path) -> list[str]:
    """Flags of that run, of which tmp_path / "out" is a copy."""
    shutil.copytree(stopped, tmp_path / "out")
    return [*flags, *STEPWISE]


def test_speed_of_a_resumed_run(run: Run, interrupted: list[str], tmp_path: Path) -> None:
    """Trap 64: three of six steps were taken before the interruption, and so half of the tokens."""
    tokens = []
    for how in ("--resume_from_checkpoint", "--overwrite_output_dir"):
        run(*interrupted, how, "True")
        speed = json.loads((tmp_path / "out/training_report.json").read_text(encoding="utf-8"))["speed"]
        tokens.append(speed["tokens_per_second"] * speed["step_seconds"])
    assert tokens[0] == pytest.approx(tokens[1] / 2)


@pytest.mark.parametrize("how", ["True", "folder"])
def test_resumed_run_equals_an_undisturbed_one(
    run: Run, interrupted: list[str], trained: Callable[..., Path], tmp_path: Path, how: str
) -> None:
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    run(*interrupted, "--resume_from_checkpoint", "True" if how == "True" else out / "checkpoint-3")
    assert equal_weights(out, trained(train_lora, *STEPWISE))


def test_broken_checkpoints_are_passed_over(
    run: Run, interrupted: list[str], trained: Callable[..., Path], tmp_path: Path
) -> None:
    """Trap 39: the newest complete checkpoint is used."""
    out = tmp_path / "out"
    optimizer = out / "checkpoint-3" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    run(*interrupted, "--resume_from_checkpoint", "True")
    assert equal_weights(out, trained(train_lora, *STEPWISE))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_checkpoint_without_a_part_is_refused(run: Run, interrupted: list[str], tmp_path: Path, name: str) -> None:
    checkpoint = tmp_path / "out" / "checkpoint-3"
    (checkpoint / name).unlink()
    message = run(*interrupted, "--resume_from_checkpoint", checkpoint, expected=2)
    assert "no complete checkpoint" in message


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--lora_alpha", "16"], "lora_alpha 32, not 16"),
        (["--target_modules", "q_proj,k_proj,o_proj"], "target_modules"),  # trap 40: a segfault without the check
        (["--data_path", "other"], "data_sha256"),
        (["--model_path", "other"], "another base model: it has the same shape"),
        (["--prompt_format", "chat"], "prompt_format"),
        (["--seed", "1"], "--seed 42, not 1"),  # trap 63
        (["--max_length", "99"], "--max_length 1024, not 99"),
        (["--per_device_train_batch_size", "2"], "x --gradient_accumulation_steps x processes) 4, not 2"),
        (["--gradient_accumulation_steps", "2"], "x --gradient_accumulation_steps x processes) 4, not 8"),
        (["--learning_rate", "1e-5"], "--learning_rate 0.0003, not 1e-05"),
        (["--accelerator_config", '{"use_seedable_sampler": false}'], "--accelerator_config {"),
        (["--resume_from_checkpoint", "latest"], "write True, for "),
    ],
)
def test_resuming_something_else_is_refused(
    run: Run, interrupted: list[str], tmp_path: Path, rows_path: str, changed: list[str], words: str
) -> None:
    if changed[0] == "--data_path":
        other = tmp_path / "other.json"
        other.write_text(Path(rows_path).read_text(encoding="utf-8").replace("sun", "son"), encoding="utf-8")
        changed = ["--data_path", str(other)]
    if changed[0] == "--model_path":
        changed = ["--model_path", save_checkpoint(tmp_path / "model", make_tokenizer(), make_model(seed=1))]
    message = run(*interrupted, "--resume_from_checkpoint", "True", *changed, expected=2)
    assert words in message and "checkpoint-3" in message


def test_resuming_with_other_texts_or_tokens(
    run: Run, interrupted: list[str], base_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 92: the same flags, but what the model reads has changed."""
    checkpoint = tmp_path / "out/checkpoint-3"
    info = json.loads((checkpoint / "adapter_info.json").read_text(encoding="utf-8"))
    template = checkpoint / "chat_template.jinja"
    text = template.read_text(encoding="utf-8")
    flags = [*interrupted, "--resume_from_checkpoint", checkpoint]
    monkeypatch.setattr(checkpoints, "find_broken_part", lambda folder: None)  # which knows the sizes of the files
    for name, changed, words in (
        ("chat_template.jinja", text.replace("Output", "Answer"), "another chat template"),
        ("adapter_info.json", json.dumps(info | {"tokens": [999, 9]}), "tokens [999, 9], not ["),
    ):
        before = (checkpoint / name).read_text(encoding="utf-8")
        (checkpoint / name).write_text(changed, encoding="utf-8")
        assert words in run(*flags, expected=2)
        (checkpoint / name).write_text(before, encoding="utf-8")


def test_resuming_at_the_end(run: Run, flags: list[str], tmp_path: Path) -> None:
    """A run that was killed between its last checkpoint and its adapter takes no step more."""
    flags = [*flags, *"--max_steps 4 --save_steps 2 --keep_checkpoints True --lr_scheduler_type constant".split()]
    run(*flags)
    first, second = tmp_path / "out", tmp_path / "second"
    shutil.copytree(first / "checkpoint-4", second / "checkpoint-4")
    printed = run(*flags, "--output_dir", second, "--resume_from_checkpoint", True)
    assert "steps       4 from step 4" in printed and equal_weights(first, second)
    assert sorted(path.name for path in second.glob("checkpoint-*")) == ["checkpoint-4"]
    assert json.loads((second / "training_report.json").read_text(encoding="utf-8"))["steps"] == 4
    # a finished adapter is no checkpoint
    message = run(*flags, "--output_dir", second, "--resume_from_checkpoint", first, expected=2)
    assert "this is no complete checkpoint; write True" in message


# ---- mistakes


def test_used_output_dir_is_left_alone(
    run: Run, flags: list[str], trained: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(trained(train_lora), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    message = run(*flags, expected=2)
    assert "already holds an adapter" in message and "--overwrite_output_dir True" in message
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    run(*flags, "--overwrite_output_dir", True, "--seed", 5)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != before["adapter_model.safetensors"]


@pytest.mark.parametrize("limit", ["a file", "no permission"])
def test_output_dir_is_tried_first(
    run: Run, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """Trap 70: not after minutes of loading."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    folder = tmp_path / ("file/out" if limit == "a file" else "out")
    if limit == "no permission":
        monkeypatch.setattr("tempfile.TemporaryFile", Mock(side_effect=PermissionError(13, "Permission denied")))
    assert "cannot be written" in run(*flags, "--output_dir", folder, "--model_path", "no/such", expected=2)


def test_model_folder_is_no_output_dir(run: Run, flags: list[str], base_path: str) -> None:
    message = run(*flags, "--output_dir", base_path, "--overwrite_output_dir", True, expected=2)
    assert "holds a model" in message


BAD_FLAGS = {
    "missing model": (["--model_path", "models/no-such-model"], ["--model_path", "models/no-such-model", "exist"]),
    "model folder without a model": (["--model_path", "tests"], ["config.json"]),
    "missing data": (["--data_path", "no.json"], ["no.json", "does not exist"]),
    "one wrong module": (["--target_modules", "q_proj,c_attn"], ["'c_attn'", "gate_proj", "o_proj"]),  # traps 9, 34
    "only a wrong module": (["--target_modules", "c_attn"], ["'c_attn'", "q_proj"]),
    "no module": (["--target_modules", ","], ["--target_modules", "q_proj"]),
    "rank 0": (["--lora_r", "0"], ["--lora_r"]),
    "alpha 0": (["--lora_alpha", "0"], ["--lora_alpha"]),  # trap 5
    "dropout 1": (["--lora_dropout", "1"], ["--lora_dropout"]),
    "too short": (["--max_length", "1"], ["--max_length"]),
    "nothing left": (["--max_length", "4"], ["--max_length"]),  # trap 14
    "unknown flag": (["--lora_rnk", "4"], ["--lora_rnk", "--lora_r"]),
    "abbreviation": (["--learning", "4"], ["--learning"]),
    "stray word": (["True"], ["'True'"]),
    "not a number": (["--learning_rate", "fast"], ["--learning_rate", "fast"]),
    "not a choice": (["--prompt_format", "alpaca"], ["--prompt_format", "alpaca"]),
    "old name": (["--evaluation_strategy", "epoch"], ["--evaluation_strategy", "--eval_strategy"]),  # trap 32
    "old name, warmup": (["--warmup_ratio", "0.1"], ["--warmup_ratio", "--warmup_steps"]),
    "no rows to evaluate": (["--eval_strategy", "epoch"], ["--eval_strategy", "--eval_data_path"]),
    "label smoothing": (["--label_smoothing_factor", "0.1"], ["--label_smoothing_factor"]),
    "compilation": (["--torch_compile", "True"], ["--torch_compile", "each new length", "leave it out"]),
    "compilation, by its backend": (["--torch_compile_backend", "eager"], ["--torch_compile", "leave it out"]),
    "reports": (["--report_to", "wandb"], ["pip install wandb"]),
    "liger": (["--use_liger_kernel", "True"], ["--use_liger_kernel", "liger-kernel"]),
    "best of nothing": (["--load_best_model_at_end", "True"], ["--load_best_model_at_end", "--eval_data_path"]),
    "bad combination": (
        "--load_best_model_at_end True --eval_data_path ROWS --eval_strategy steps --save_strategy epoch".split(),
        ["load_best_model_at_end requires the save and eval strategy to match"],
    ),
    "resume from nothing": (["--resume_from_checkpoint", "True"], ["--resume_from_checkpoint"]),
    "resume and overwrite": (
        ["--resume_from_checkpoint", "True", "--overwrite_output_dir", "True"],
        ["--resume_from_checkpoint", "--overwrite_output_dir"],
    ),
}


@pytest.mark.parametrize(("words", "parts"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_mistakes(
    run: Run, flags: list[str], rows_path: str, tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    message = run(*flags, *[word.replace("ROWS", rows_path) for word in words], expected=2)
    for part in parts:
        assert part in message
    assert not (tmp_path / "out").exists()


def test_target_modules_are_stripped(run: Run, flags: list[str], tmp_path: Path) -> None:
    """Trap 9: a space after a comma."""
    run(*flags, "--target_modules", "q_proj, v_proj ,", "--max_steps", 1)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]


def test_all_linear(run: Run, flags: list[str], tmp_path: Path) -> None:
    run(*flags, "--target_modules", "all-linear", "--max_steps", 1)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert len(config["target_modules"]) == 7 and "lm_head" not in config["target_modules"]


def test_kept_cut_and_dropped_add_up(base_path: str, rows_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Trap 14, at every length."""
    tokenizer = load_tokenizer(ModelArguments(model_path=base_path), "auto")
    seen = set()
    for length in range(21, 60):
        capsys.readouterr()
        data = preprocess(rows_path, tokenizer, length)
        dataset, learnt = data.dataset, sum(label != -100 for labels in data.dataset["labels"] for label in labels)
        assert (data.summary.tokens, data.summary.supervised) == (sum(dataset["length"]), learnt)
        printed = capsys.readouterr().out
        counts = re.findall(
            r"(\d+) (?:kept|truncated|dropped)", printed.replace("rows, all kept", "kept, 0 truncated, 0 dropped")
        )
        whole, cut, dropped = map(int, counts)
        assert whole + cut + dropped == 12
        assert len(dataset) == whole + cut
        assert sum(labels[-1] == 257 for labels in dataset["labels"]) == whole
        assert all(any(label != -100 for label in labels) for labels in dataset["labels"])
        seen.add((whole > 0, cut > 0, dropped > 0))
    assert len(seen) > 2


def test_padding_where_noise_depends_on_length(run: Run, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """NEFTune scales its noise by the sequence's length, so rows keep sequences of their own."""
    used = []
    monkeypatch.setattr(
        "finetuning.training.trainer.PadCollator", lambda *args: used.append(args) or PadCollator(*args)
    )
    run(*flags, "--neftune_noise_alpha", 5)
    assert used


def test_push_to_hub(run: Run, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 62: the checked adapter is uploaded, once, and nothing else."""
    calls, uploaded = [], []

    def create(name: str, **more: Any) -> Mock:
        calls.append((name, more))
        return Mock(repo_id=f"me/{name}")

    def upload(repo_id: str, folder_path: str, ignore_patterns: list[str], **more: Any) -> None:
        uploaded.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir()), ignore_patterns))

    monkeypatch.setattr(hub, "create_repo", create)
    monkeypatch.setattr(hub, "upload_folder", upload)
    flags = [*flags, "--push_to_hub", True, "--hub_token", "t", "--save_steps", 2, "--keep_checkpoints", True]
    assert "uploaded to me/out" in run(*flags)
    assert calls == [("out", {"token": "t", "private": None, "exist_ok": True})]
    files = ["README.md", "adapter_config.json", "adapter_info.json", "adapter_model.safetensors"]
    files += ["chat_template.jinja", "checkpoint-4", "checkpoint-6", "loss.png", "training_report.json"]
    assert uploaded == [("me/out", files, ["checkpoint-*"])]

    monkeypatch.setattr(hub, "upload_folder", Mock(side_effect=ConnectionError("no route")))
    message = run(*flags, "--overwrite_output_dir", True, expected=1)
    assert "no route" in message and f"hf upload me/out {tmp_path / 'out'}" in message
    assert (tmp_path / "out/adapter_model.safetensors").exists()
    monkeypatch.setattr(hub, "create_repo", Mock(side_effect=ValueError("log in first")))
    message = run(*flags, "--overwrite_output_dir", True, expected=2)  # before anything is loaded
    assert "log in first" in message and "hf auth login" in message
    assert "--hub_strategy" in run(*flags, "--hub_strategy", "every_save", expected=2)


def test_adapter_that_is_not_finite_is_not_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After training: also if the very last step, which no loss has seen yet, made the weights infinite."""
    model = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    start = adapter_state(model)
    next(p for p in model.parameters() if p.requires_grad).data[0, 0] = float("nan")
    with pytest.raises(SystemExit) as stop:
        save_adapter(model, adapter_state(model), str(tmp_path), start, {})
    assert stop.value.code == 1 and "NaN" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_saved_file_is_checked(run: Run, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After training: what is on disk is read back and compared before it becomes the adapter."""

    def corrupt(path: Path) -> dict[str, torch.Tensor]:
        return {name: tensor + 1 for name, tensor in adapter_weights(path.parent).items()}

    monkeypatch.setattr("finetuning.model.folder.load_file", corrupt)
    assert "read back" in run(*flags, expected=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-6"]
