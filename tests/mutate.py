"""Take the guards out, one at a time, in a copy of the repository, and see that a test fails each time.

    python tests/mutate.py                 # all of them: some ten minutes
    python tests/mutate.py checkpoints     # those in which the word occurs

A guard whose absence no test notices is a guard that the next change may lose.
"""

# ruff: noqa: E501  a line for each mutant

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]


class Mutant(NamedTuple):
    file: str
    old: str  # occurs once in the file
    new: str
    test: str  # a file of tests/, and perhaps words for pytest's -k


MUTANTS = [
    # prompts and labels
    Mutant("prompts.py", "split_special_tokens=True", "split_special_tokens=False", "test_prompts"),
    Mutant("prompts.py", "return special_tokens(tokenizer).sub(", "return text or special_tokens(tokenizer).sub(", "test_prompts"),
    Mutant("prompts.py", "enable_thinking=False", "enable_thinking=True", "test_prompts"),
    Mutant("prompts.py", "return answer[:stop]", "return answer", "test_prompts"),
    Mutant("prompts.py", 'name = "chat" if tokenizer.eos_token == "<|im_end|>" else "plain"', 'name = "chat"', "test_prompts"),
    Mutant("prompts.py", "if not last_prompt.startswith(first_prompt):", "if False:", "test_prompts"),
    Mutant("prompts.py", "except TemplateError as error:", "except ZeroDivisionError as error:", "test_inference sends"),
    # rows
    Mutant("rows.py", '"utf-8-sig"', '"utf-8"', "test_rows"),
    Mutant("rows.py", 'text.split("\\n")', "text.splitlines()", "test_rows"),
    Mutant("rows.py", 'value.encode("utf-8")', "pass", "test_rows"),
    # batches, attention, loss
    Mutant("collators.py", '            "use_cache": False,\n            **name_rows(rows),\n            **supervised_only(labels),', '            **name_rows(rows),\n            **supervised_only(labels),', "test_collators"),
    Mutant("collators.py", 'for label in [IGNORE_INDEX, *row["labels"][1:]]', 'for label in row["labels"]', "test_collators"),
    Mutant("collators.py", "return config.model_type in FULL_ATTENTION_FAMILIES and", "return", "test_collators"),
    Mutant("attention.py", "states.split(row_lengths, dim=2)", "[states]", "test_losses"),
    Mutant("losses.py", "probabilities.mul_(counted[part])", "probabilities", "test_losses"),
    Mutant("losses.py", "logits.gather(1, targets[part])) * counted[part]", "logits.gather(1, targets[part]))", "test_losses"),
    Mutant("losses.py", "tokens = max(1, LOGITS_MEMORY // (4 * len(weight)))", "tokens = len(hidden)", "test_losses"),
    Mutant("trainer.py", "and training_args.neftune_noise_alpha is None", "", "test_training noise"),
    # before training
    Mutant("common.py", "parameter.data = parameter.data.float()", "pass", "test_training"),
    Mutant("train_lora.py", "if missing or not names:", "if len(missing) == len(names):", "test_training mistakes"),
    Mutant("train_lora.py", "name.strip() for name", "name for name", "test_training stripped"),
    Mutant("train_lora.py", "if self.lora_alpha < 1:", "if False:", "test_training mistakes"),
    Mutant("train_lora.py", "    set_seed(training_args.seed)\n", "", "test_training two_runs"),
    Mutant("train_prompt_tuning.py", "start = mean + deviation * torch.randn", "start = torch.randn", "test_prompt_tuning starts"),
    Mutant("train_prompt_tuning.py", "if count >= positions:", "if False:", "test_prompt_tuning mistakes"),
    Mutant("arguments.py", "training_args._n_gpu = 1", "pass", "test_training one_gpu"),
    Mutant("arguments.py", "if training_args.label_smoothing_factor:", "if False:", "test_training mistakes"),
    Mutant("arguments.py", "flags.fp16 = flags.fp16 and on_cuda and not flags.bf16", "pass", "test_training"),
    Mutant("arguments.py", "if flags.load_best_model_at_end:", "if False:", "test_training mistakes"),
    Mutant("arguments.py", 'if name not in ("none", "all") and not find_spec(name):', "if False:", "test_training mistakes"),
    Mutant("checkpoints.py", "if told or not folder.is_dir()", "if True or not folder.is_dir()", "test_training used_output"),
    Mutant("checkpoints.py", 'if (folder / "config.json").exists():', "if False:", "test_training model_folder"),
    # during training
    Mutant("arguments.py", "logging_nan_inf_filter=False,", "logging_nan_inf_filter=True,", "test_training not_finite"),
    Mutant("guards.py", "if not math.isfinite(value):", "if False:", "test_training not_finite"),
    Mutant("guards.py", "control.should_log = control.should_log or control.should_save", "pass", "test_training not_finite"),
    Mutant("guards.py", "bad = [forward for forward in self.forwards if not forward[2].isfinite()]", "bad = []", "test_training named"),
    Mutant("guards.py", "control.should_save = control.should_training_stop = True", "control.should_training_stop = True", "test_interruption signals"),
    Mutant("guards.py", "raise KeyboardInterrupt", "pass", "test_interruption second"),
    Mutant("memory.py", "fail(f\"out of memory:", "raise RuntimeError(f\"out of memory:", "test_memory message"),
    # checkpoints
    Mutant("checkpoints.py", "self.args.output_dir = str(scratch)", "scratch = folder", "test_interruption whole_or"),
    Mutant("checkpoints.py", "self.state.best_model_checkpoint = str(folder / name)", "pass", "test_interruption best"),
    Mutant("checkpoints.py", "if not is_disk_error(error):", "if True:", "test_interruption full_disk"),
    Mutant("checkpoints.py", "if broken is None:", "if True:", "test_training broken or part"),
    Mutant("checkpoints.py", "if old != json.loads(json.dumps(value)):", "if False:", "test_training resuming_something and alpha"),
    Mutant("checkpoints.py", "if saved_info[name] != info[name]:", "if False:", "test_training resuming_something"),
    Mutant("checkpoints.py", "if not zipfile.is_zipfile(path):", "if False:", "test_training broken"),
    # the saved adapter
    Mutant("adapters.py", "if all(torch.equal(tensor, start[name]) for name, tensor in state.items()):", "if False:", "test_training nothing_trained"),
    Mutant("adapters.py", "if saved.keys() != state.keys() or not", "if False and not", "test_training saved_file"),
    Mutant("adapters.py", "if not all(tensor.half().isfinite().all() for tensor in state.values()):", "if False:", "test_training million or not_finite"),
    # inference
    Mutant("adapters.py", "if not all(tensor.isfinite().all() for tensor in weights.values()):", "if False:", "test_inference nan"),
    Mutant("adapters.py", 'if found["sizes"].get(name) != value:', "if False:", "test_inference other_bases"),
    Mutant("adapters.py", "if values.shape != other.shape or", "if False and", "test_inference other_bases"),
    Mutant("adapters.py", 'if quantization != info["quantization"]:', "if False:", "test_inference quantisation"),
    Mutant("adapters.py", 'or config.get("megatron_config")', "", "test_inference sends"),
    Mutant("adapters.py", "if info and name not in info", "if False", "test_inference sends"),
    Mutant("common.py", "use_safetensors=True,", "", "test_inference sends"),
    Mutant("common.py", "model.generation_config = GenerationConfig()", "pass", "test_generation own_configuration"),
    Mutant("generation.py", "eos_token_id=stop_ids,", "eos_token_id=stop_ids[:1],", "test_generation both_stop"),
    Mutant("generation.py", "        do_sample=do_sample,\n", "", "test_generation own_configuration"),
    Mutant("generation.py", "        repetition_penalty=repetition_penalty,\n", "        repetition_penalty=None,\n", "test_generation"),
    Mutant("generation.py", "prompt_ignore_length=behind", "prompt_ignore_length=0", "test_generation single_rows"),
    Mutant("generation.py", "prompts = [model.virtual_tokens + ids for ids in prompts]", "pass", "test_prompt_tuning batched"),
    Mutant("soft_prompts.py", "embeds = self.embed(input_ids, attention_mask.cumsum(dim=1) - 1)", "embeds = self.embed(input_ids, torch.arange(input_ids.shape[1]).expand_as(input_ids))", "test_prompt_tuning batched"),
    Mutant("labels.py", "scores = of_shared.unsqueeze(1) + ", "scores = ", "test_labels brute_force"),
    Mutant("labels.py", "(log_probabilities * real[:, 1:])", "log_probabilities", "test_labels brute_force"),
    Mutant("predictions.py", "self.file.truncate(len(whole))", "pass", "test_inference goes_on"),
    Mutant("predictions.py", 'if head["settings"].get(name) != value:', "if False:", "test_inference goes_on"),
    Mutant("metrics.py", "answer if answer in labels else OTHER", "answer", "test_metrics label_words"),
    Mutant("benchmark.py", "if not difference <= tolerance:", "if difference > 99:", "test_benchmark compared"),
]  # fmt: skip


def survives(mutant: Mutant) -> bool:
    """Run the mutant's tests in a copy; returns whether they pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(
            REPOSITORY, copy, ignore=shutil.ignore_patterns(".*", "outputs", "models", "data", "__pycache__")
        )
        for name in ("models", "data"):
            (copy / name).symlink_to(REPOSITORY / name)
        text = (copy / mutant.file).read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            print(f"  occurs {text.count(mutant.old)} times")
            return True
        (copy / mutant.file).write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        name, _, words = mutant.test.partition(" ")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{name}.py"]
        command += ["-k", words] if words else []
        result = subprocess.run(command, cwd=copy, capture_output=True, encoding="utf-8", check=False)
        if result.returncode not in (0, 1):  # no test ran, or the mutant does not parse
            print("  " + result.stdout.strip().splitlines()[-1])
        return result.returncode != 1


def main() -> None:
    mutants = [mutant for mutant in MUTANTS if all(word in " ".join(mutant) for word in sys.argv[1:])]
    survivors = 0
    for number, mutant in enumerate(mutants, 1):
        lives = survives(mutant)
        survivors += lives
        print(
            f"{number:3} {'SURVIVES' if lives else 'killed  '} {mutant.file}: {mutant.old.strip()[:80]!r}", flush=True
        )
    print(f"{len(mutants)} mutants, {survivors} survive")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
