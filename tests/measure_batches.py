"""Measure what the batches of collators.py save against padding: CPU time, peak memory, and the loss of every step.

    python tests/measure_batches.py --model_path path/to/qwen --data_path rows.json

Trains with the training scripts' own functions and defaults (dropout 0, so that losses can be compared) twice, each
time in a fresh process: with the stock Trainer, PEFT's model and DataCollatorForSeq2Seq, and as the scripts do. On a
GPU it compares wall time and the GPU's memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def measure(args: argparse.Namespace) -> None:
    """Train for some steps; print one line of JSON."""
    import torch
    from peft import PeftModelForCausalLM, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, set_seed

    from arguments import parse_arguments
    from collators import FlattenCollator
    from common import build_dataset, load_model, load_tokenizer, peak_memory, training_dtype
    from train_lora import LoraArguments, build_lora_config
    from train_prompt_tuning import PromptTuningArguments, add_soft_prompt

    with tempfile.TemporaryDirectory() as folder:
        flags = f"--model_path {args.model_path} --data_path {args.data_path} --output_dir {folder}/out"
        flags += f" --per_device_train_batch_size {args.batch_size} --max_steps {args.steps} --learning_rate 3e-4"
        flags += " --save_strategy no --logging_steps 1 --disable_tqdm True"
        flags += " --lora_dropout 0" if args.method == "lora" else " --num_virtual_tokens 20"
        method_arguments = LoraArguments if args.method == "lora" else PromptTuningArguments
        model_args, data_args, method_args, training_args = parse_arguments(method_arguments, None, flags.split())
        set_seed(training_args.seed)
        tokenizer = load_tokenizer(model_args, data_args.prompt_format)
        dataset = build_dataset(data_args.data_path, tokenizer, data_args.max_length)
        model = load_model(model_args, training_dtype(training_args), training_args.device)
        if args.method == "lora":
            model, virtual_tokens = get_peft_model(model, build_lora_config(method_args, model)), 0
        else:
            model = add_soft_prompt(model, tokenizer, method_args)
            virtual_tokens = len(model.virtual_tokens)
        if args.only == "stock":
            collator = DataCollatorForSeq2Seq(tokenizer)
            model.__class__ = PeftModelForCausalLM  # PEFT's own forward and placement
        else:
            collator = FlattenCollator(virtual_tokens)
        trainer = Trainer(model, training_args, train_dataset=dataset, data_collator=collator)
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    on_cuda = torch.cuda.is_available()
    print(json.dumps({"seconds": wall if on_cuda else cpu, "gib": peak_memory() / 2**30, "losses": losses}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default="models/tiny-qwen")
    parser.add_argument("--data_path", default="data/train.json")
    parser.add_argument("--method", choices=["lora", "prompt_tuning"], default="lora")
    parser.add_argument("--batch_size", type=int, default=8, help="rows a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", choices=["stock", "flattened"], help="measure one of the two, in this process")
    args = parser.parse_args()
    if args.only:
        measure(args)
        return
    results = {}
    for only in ("stock", "flattened"):
        command = [sys.executable, __file__, "--only", only]
        for name in ("model_path", "data_path", "method", "batch_size", "steps"):
            command += [f"--{name}", str(getattr(args, name))]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[only] = json.loads(output.strip().splitlines()[-1])
    stock, flattened = results["stock"], results["flattened"]
    print("| | stock Trainer, padded | this repository | ratio |\n|---|--:|--:|--:|")
    for name, unit in (("seconds", "seconds of training"), ("gib", "peak memory, GiB")):
        print(f"| {unit} | {stock[name]:.1f} | {flattened[name]:.1f} | {flattened[name] / stock[name]:.2f} |")
    print(f"| loss of the last step | {stock['losses'][-1]:.5f} | {flattened['losses'][-1]:.5f} | |")
    difference = max(abs(a - b) for a, b in zip(stock["losses"], flattened["losses"], strict=True))
    print(f"largest difference of a step's loss: {difference:.1e}")


if __name__ == "__main__":
    main()
