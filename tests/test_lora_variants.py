"""LoRA's variants through the flags of train_lora.py: each trains, resumes, reloads in plain PEFT, and merges."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from peft import PeftModel
from support import Run, equal_weights, make_model, save_checkpoint, shorten_answers, six_steps
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import inference
import merge_adapter
import train_lora
from finetuning.model import lora
from finetuning.model.lora import find_numbers, make_optimizer

EXPERTS = "--target_parameters mlp.experts.gate_up_proj,experts.down_proj --lora_dropout 0"
VARIANTS = {
    "rsLoRA": "--use_rslora True",
    "DoRA": "--use_dora True",
    "PiSSA": "--init_lora_weights pissa",
    "OLoRA": "--init_lora_weights olora",
    "orthogonal": "--init_lora_weights orthogonal",
    "LoRA+": "--loraplus_lr_ratio 16 --learning_rate 1e-3",
    "one layer": "--layers_to_transform 1-1",
    "output layer": "--modules_to_save lm_head",
    "experts": EXPERTS,
    "ranks": '--lora_kwargs {"rank_pattern":{"q_proj":4},"bias":"lora_only"}',
}
QUICK = ("PiSSA",)


@pytest.fixture(scope="module")
def moe_path(tmp_path_factory: pytest.TempPathFactory, instruct_path: str) -> str:
    folder = tmp_path_factory.mktemp("moe")
    return save_checkpoint(folder, AutoTokenizer.from_pretrained(instruct_path), make_model("qwen3_moe"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in VARIANTS]
)
def test_variant(
    run_main: Run,
    name: str,
    instruct_path: str,
    moe_path: str,
    rows_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An adapter that was resumed equals one that was not, and answers in plain PEFT and merged as in inference.py."""
    shorten_answers(monkeypatch)
    base = moe_path if name == "experts" else instruct_path
    flags = [*VARIANTS[name].split(), "--save_steps", 3, "--keep_checkpoints", True, "--sample_answers", 1]
    flags = ["--learning_rate", 0.01, *flags, "--eval_metrics", False]
    folder, resumed = tmp_path / "adapter", tmp_path / "resumed"
    printed = run_main(train_lora, *six_steps(base, rows_path, folder), *flags)
    # of a base model whose weights the adapter has changed there are no answers
    assert ("\n  base " in printed) == (name not in ("PiSSA", "OLoRA"))
    checkpoint = ["--resume_from_checkpoint", folder / "checkpoint-3"]
    run_main(train_lora, *six_steps(base, rows_path, resumed), *flags, *checkpoint)
    assert equal_weights(folder, resumed)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert VARIANTS[name].split()[0].removeprefix("--") in card

    run_main(
        merge_adapter, "--adapter_path", folder, "--output_dir", tmp_path / "merged", "--check_data_path", rows_path
    )
    asked = []
    for source in (["--adapter_path", folder], ["--model_path", tmp_path / "merged"]):
        file = tmp_path / f"answers-{len(asked)}.jsonl"
        run_main(inference, *source, "--data_path", rows_path, "--output_file", file, "--max_new_tokens", 8)
        asked.append([json.loads(line)["prediction"] for line in file.read_text(encoding="utf-8").splitlines()])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(base, chat_template=(folder / "chat_template.jinja").read_text())
    plain = [answer(model, tokenizer, row) for row in json.loads(Path(rows_path).read_text(encoding="utf-8"))]
    assert asked[0] == asked[1] == plain


def answer(model: PeftModel, tokenizer: AutoTokenizer, row: dict[str, str]) -> str:
    """What plain PEFT and transformers answer."""
    messages = [{"role": "user", "content": row["instruction"]}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids.input_ids.shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True)


def test_loraplus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The B matrices get the higher rate."""
    model = lora.get_peft_model(make_model(), train_lora.LoraArguments().make_config(["q_proj"]))
    optimizer = make_optimizer(model, TrainingArguments(use_cpu=True, learning_rate=1e-3, weight_decay=0.1), 16)
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    names = {name: rates[parameter] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {rate for name, rate in names.items() if "lora_A" in name} == {1e-3}
    assert {rate for name, rate in names.items() if "lora_B" in name} == {0.016}
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert make_optimizer(model, TrainingArguments(use_cpu=True), None) is None
    monkeypatch.setattr(lora, "create_loraplus_optimizer", Mock(side_effect=KeyError("groups")))
    with pytest.raises(SystemExit):
        make_optimizer(model, TrainingArguments(use_cpu=True), 16)
    assert "--loraplus_lr_ratio with --optim adamw_torch" in capsys.readouterr().err


REFUSED = {
    "--lora_kwargs {": "--lora_kwargs '{'",
    "--lora_kwargs [1]": "--lora_kwargs '[1]'",
    '--lora_kwargs {"rank":3}': "'rank'",
    '--lora_kwargs {"r":3}': "'r'",
    '--lora_kwargs {"bias":"lora_only","eva_config":{}}': "eva_config takes more than a flag",
    "--loraplus_lr_ratio 0.5": "at least 1",
    "--init_lora_weights loftq": "add --load_in_4bit True",
    "--init_lora_weights orthogonal --lora_r 3": "rank to be even",
    "--load_in_4bit True --init_lora_weights pissa": "for 4 bits there is loftq",
    "--layers_to_transform 0-2": "layers 0 to 1",
    "--layers_to_transform 1-0": "layers 0 to 1",
    "--layers_to_transform one": "layers 0 to 1",
    "--modules_to_save head": "It has: ",
    "--target_parameters experts": "It has: none",
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused(run_main: Run, instruct_path: str, rows_path: str, tmp_path: Path, words: str) -> None:
    message = run_main(train_lora, *six_steps(instruct_path, rows_path, tmp_path / "out"), *words.split(), expected=2)
    assert REFUSED[words] in message


def test_resuming_with_another_ratio(run_main: Run, instruct_path: str, rows_path: str, tmp_path: Path) -> None:
    flags = six_steps(instruct_path, rows_path, tmp_path / "out") + "--save_steps 3 --keep_checkpoints True".split()
    run_main(train_lora, *flags, "--sample_answers", 0, "--loraplus_lr_ratio", 4)
    groups = torch.load(tmp_path / "out/checkpoint-3/optimizer.pt")["param_groups"]
    assert groups[2]["initial_lr"] == 4 * groups[0]["initial_lr"]
    resumed = [*flags, "--resume_from_checkpoint", tmp_path / "out/checkpoint-3"]
    assert "--loraplus_lr_ratio 4.0, not None" in run_main(train_lora, *resumed, expected=2)


def test_loftq(monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins with the weights before their quantisation; PEFT does that on GPUs only."""
    replace = Mock()
    monkeypatch.setattr(lora, "replace_lora_weights_loftq", replace)
    monkeypatch.setattr(lora, "quantization", Mock(return_value="nf4"))
    base = make_model()
    monkeypatch.setattr(type(base), "device", torch.device("cuda"))
    config = train_lora.LoraArguments(init_lora_weights="loftq").make_config(["q_proj"])
    model = lora.add_lora(base, config, "path/to/qwen")
    replace.assert_called_once_with(model, "path/to/qwen")


def test_layer_numbers() -> None:
    assert find_numbers(make_model(num_hidden_layers=6), "0, 2-4") == [0, 2, 3, 4]
    assert find_numbers(make_model(), None) is None


def test_export_of_what_changes_its_base(run_main: Run, instruct_path: str, rows_path: str, tmp_path: Path) -> None:
    """Engines would add it to the weights as they are."""
    flags = [*six_steps(instruct_path, rows_path, tmp_path / "out"), "--sample_answers", 0]
    run_main(train_lora, *flags, "--init_lora_weights", "olora", "--learning_rate", 0.01)
    export = ["--adapter_path", tmp_path / "out", "--output_dir", tmp_path / "new", "--export", "peft"]
    assert "began with olora" in run_main(merge_adapter, *export, expected=2)
