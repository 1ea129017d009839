"""The memory of a model and a training step on a CPU, computed and measured, in MiB; one JSON line for each case.

    MALLOC_MMAP_THRESHOLD_=65536 python tests/peaks.py '[[512, 1536, 6, 8, 2, 16000, 512]]'

Each shape is: hidden size, intermediate size, layers, heads, key-value heads, vocabulary, and the tokens of a row. With
that variable, memory that PyTorch frees goes back to the system at once (Linux, glibc).
"""

import gc
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback, TrainingArguments

from finetuning.cli.memory import peak_memory, reset_peak_memory, used_memory
from finetuning.model.soft_prompts import SoftPromptModel
from finetuning.training.dry_run import count_kept, make_optimizer_states, take_pass
from finetuning.training.memory import compute_step, measure_size
from finetuning.training.trainer import make_trainer

CPU = torch.device("cpu")
TOKENS = 20  # of a soft prompt


def make_model(shape: list[int], method: str) -> PeftModel:
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
    config = AutoConfig.for_model("qwen2", **dict(zip(names.split(), shape, strict=False)), tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if method == "prompt_tuning":
        return SoftPromptModel(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))
    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj", "v_proj"], lora_dropout=0.05)
    )


class Peak(TrainerCallback):
    """Takes two passes on a row, before the steps of a run, and remembers the peak of the second."""

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self.kept = count_kept(self.trainer)
        make_optimizer_states(self.trainer)
        for _ in range(2):
            reset_peak_memory(CPU)
            take_pass(self.trainer, self.rows)
            self.trainer.model.zero_grad()
            self.peak = peak_memory(CPU)


def compare(shape: list[int], method: str, checkpointing: bool, folder: str) -> dict[str, object]:
    before, tokens = used_memory(CPU), shape[-1]
    model = make_model(shape, method)
    row = {"input_ids": list(range(tokens)), "labels": list(range(tokens)), "length": tokens}
    args = TrainingArguments(
        folder,
        use_cpu=True,
        num_train_epochs=0,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=checkpointing,
    )
    meter = Peak()
    meter.rows, meter.trainer = [row], make_trainer(model, 0, args, Dataset.from_list([row]))
    meter.trainer.add_callback(meter)
    meter.trainer.train()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    tokens += TOKENS if method == "prompt_tuning" else 0
    need = compute_step(measure_size(model.get_base_model()), meter.kept, tokens, trained, checkpointing)
    case = {"shape": shape, "method": method, "checkpointing": checkpointing}
    sizes = {"weights": need.weights, "computed": need.total(), "measured": meter.peak - before}
    return case | {name: round(size / 2**20) for name, size in sizes.items()}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        # what the first step of a process loads is no part of a step
        compare([64, 128, 1, 2, 2, 500, 64], "lora", False, folder)
        for shape in json.loads(sys.argv[1]):
            for method in ("lora", "prompt_tuning"):
                for checkpointing in (False, True):
                    gc.collect()
                    print(json.dumps(compare(shape, method, checkpointing, folder)), flush=True)


if __name__ == "__main__":
    main()
