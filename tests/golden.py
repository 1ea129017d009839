"""Write tests/golden.json: the losses that a run has if nothing of this project takes part in it.

    python tests/golden.py

The stock Trainer and stock PEFT train, on padded batches with a mask and with the loss of transformers; of this project
come only the token ids and labels of the rows. test_golden.py compares our runs with the file. The weights are drawn
from a seeded generator on the CPU, which gives the same numbers on every machine. If all first losses differ, a new
version of a package draws or computes otherwise: look at its release notes, and write the file anew.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from support import EXPERTS, REPOSITORY, make_model, make_tokenizer, save_checkpoint
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from common import load_tokenizer, preprocess_function
from finetuning.cli.arguments import ModelArguments

GOLDEN = REPOSITORY / "tests/golden.json"
WORDS = ["sun", "rain", "wind", "snow", "fog", "hail", "ice", "heat", "dew", "mist"]
ROWS = [{"instruction": f"Say {word}", "output": f"{word}! " * (1 + n % 4)} for n, word in enumerate(WORDS)]
STEPS, BATCH, SEED = 20, 4, 42
RATES = {"LoRA": 0.01, "prompt tuning": 0.05}  # so large that a fault of a thousandth shows in twenty steps
PROMPT = "Classify:"
# The layers that LoRA adapts: those of attention, and of linear attention where it takes its place.
FULL, LINEAR = "q_proj,k_proj,v_proj", "in_proj_qkv,in_proj_z,out_proj"
MODULES = {
    "qwen2": FULL,
    "qwen3": FULL,
    "qwen2_moe": FULL,
    "qwen3_moe": FULL,
    "qwen3_next": f"{FULL},in_proj_qkvz,out_proj",
    "qwen3_5_text": f"{FULL},{LINEAR}",
    "qwen3_5_moe_text": f"{FULL},{LINEAR}",
}


def draw_base(folder: Path, model_type: str) -> str:
    """A checkpoint in which no weight is 0 or 1, so that none can be left out without a change of the losses.

    The norms have a larger epsilon than Qwen's 1e-6: linear attention of random weights gives numbers about 0, which
    they would blow up, and with them the last digits, in which machines differ, to 0.1 of the loss.
    """
    experts = EXPERTS if model_type == "qwen3_next" else {}  # it has them, as released
    model = make_model(model_type, rms_norm_eps=1e-3, **experts)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.data = noise if parameter.ndim > 1 or "A_log" in name else parameter.data + noise
    return save_checkpoint(folder, make_tokenizer(), model)


def stock_losses(base: str, method: str, modules: str) -> list[float]:
    """The loss of each step, without this project."""
    tokenizer = load_tokenizer(ModelArguments(model_path=base), "auto")
    rows = [example for row in ROWS for example in preprocess_function(row, tokenizer)]
    set_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if method == "LoRA":
        options = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": modules.split(",")}
        config: Any = LoraConfig(task_type="CAUSAL_LM", **options)
    else:
        options = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": PROMPT, "num_virtual_tokens": len(PROMPT)}
        config = PromptTuningConfig(task_type="CAUSAL_LM", tokenizer_name_or_path=base, **options)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=RATES[method],
            train_sampling_strategy="sequential",
            seed=SEED,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        collator = DataCollatorForSeq2Seq(tokenizer)
        trainer = Trainer(get_peft_model(model, config), args, train_dataset=rows, data_collator=collator)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [round(entry["loss"], 6) for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    torch.set_num_threads(1)
    golden: dict[str, dict[str, list[float]]] = {}
    for model_type, modules in MODULES.items():
        with tempfile.TemporaryDirectory() as folder:
            base = draw_base(Path(folder), model_type)
            golden[model_type] = {method: stock_losses(base, method, modules) for method in RATES}
    lines = [
        f'"{model_type}": {{\n' + ",\n".join(f'  "{method}": {losses}' for method, losses in methods.items()) + "\n}"
        for model_type, methods in golden.items()
    ]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
