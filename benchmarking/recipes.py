"""Which recipe pays: adapters trained by several recipes and seeds; their scores, sizes, time and memory side by side.

    python -m benchmarking.recipes --model_path path/to/qwen --data_path train.json --eval_data_path test.json

Each run is a process of its own, with its adapter in a folder of its own; the table is written as they come. The same
command goes on after an interruption: a finished run is not repeated.
"""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarking.child import find_reason
from benchmarking.pages import find_pages, write_table
from finetuning.cli.arguments import ModelArguments, ScriptParser, beside_scripts, flag
from finetuning.cli.console import fail, say, warn
from finetuning.generation.metrics import format_table
from finetuning.model.folder import METRICS, REPORT

LORA, SOFT, LINEAR = "train_lora.py", "train_prompt_tuning.py --num_virtual_tokens", "--target_modules all-linear"
RECIPES = {
    "base": "inference.py",  # the model alone
    "contract": LORA,
    "all-linear": f"{LORA} {LINEAR}",
    "all-linear-r32": f"{LORA} {LINEAR} --lora_r 32",
    "rslora": f"{LORA} {LINEAR} --lora_r 32 --use_rslora True",
    "dora": f"{LORA} {LINEAR} --use_dora True",
    "pissa": f"{LORA} {LINEAR} --init_lora_weights pissa",
    "loraplus": f"{LORA} {LINEAR} --loraplus_lr_ratio 16",
    "soft-5": f"{SOFT} 5",
    "soft-20": f"{SOFT} 20",
    "soft-100": f"{SOFT} 100",
    "soft-20-random": f"{SOFT} 20 --prompt_tuning_init RANDOM",
    "soft-20-3e-3": f"{SOFT} 20 --learning_rate 3e-3",
}
SCORES = ("exact_match", "macro_f1", "chrf", "bleu")


@dataclass
class RecipeArguments:
    _argument_group_name = "recipes"

    data_path: str = flag(beside_scripts("data/train.json"), "rows to train on")
    eval_data_path: str = flag(beside_scripts("data/test.json"), "rows to answer")
    recipes: str = flag(",".join(RECIPES), "those to compare, commas between")
    seeds: int = flag(3, "runs of each recipe, with the seeds 1, 2 and so on")
    score: str = flag("exact_match", "of all rows, which is compared", choices=list(SCORES))
    flags: str = flag("", "more flags for all training runs, such as '--num_train_epochs 1'")
    output_dir: str = flag("outputs/recipes", "folder for the adapters, and for recipes.json and recipes.png")
    report: str | None = flag(
        None, "files, commas between, that get the table between their lines <!-- recipes --> and <!-- /recipes -->"
    )

    def __post_init__(self) -> None:
        unknown = set(self.recipes.split(",")) - set(RECIPES)
        if unknown:
            raise ValueError(f"--recipes {','.join(sorted(unknown))}: choose from {', '.join(RECIPES)}")
        if self.seeds < 1:
            raise ValueError("--seeds 0: must be at least 1")


def run_recipe(name: str, seed: int, model_path: str, args: RecipeArguments) -> dict[str, Any] | str:
    """Train and answer, unless that is done; returns score, trained parameters, seconds and GiB, or why there are none.

    The base model has a score alone.
    """
    folder = Path(args.output_dir, f"{name}-{seed}")
    answers, report = folder / "answers.jsonl", folder / REPORT
    script, *flags = shlex.split(RECIPES[name])
    words = [beside_scripts(script), "--model_path", model_path, *flags]
    done = report
    if name == "base":
        done = answers.with_suffix(f".{METRICS}")
        words += ["--data_path", args.eval_data_path, "--output_file", str(answers)]
    else:
        words += ["--data_path", args.data_path, "--eval_data_path", args.eval_data_path, "--eval_strategy", "no"]
        words += ["--seed", str(seed), "--output_dir", str(folder), "--overwrite_output_dir", "True"]
        words += ["--sample_answers", "0", *shlex.split(args.flags)]
    if not done.is_file():
        child = subprocess.run([sys.executable, *words], capture_output=True, encoding="utf-8", check=False)
        if child.returncode:
            return find_reason(child.returncode, child.stderr)
    content = json.loads(done.read_text(encoding="utf-8"))
    scores = (content if name == "base" else content["metrics"])["scores"]
    result = {"score": list(scores.values())[-1].get(args.score)}  # the last is that of all tasks
    if result["score"] is None:
        return f"these rows have no {args.score}"
    if name != "base":
        result |= {"parameters": content["trainable_parameters"], "seconds": content["speed"]["seconds"]}
        result |= {"gib": content["speed"]["peak_memory_gib"]}
    return result


def tabulate(results: dict[str, list[dict[str, Any]]], score: str) -> str:
    """A Markdown table: the mean of each recipe's runs and, of the score, their standard deviation."""
    rows = [["recipe", score.replace("_", " "), "runs", "trained parameters", "training, s", "peak GiB"]]
    for name, runs in results.items():
        scores = [run["score"] for run in runs]
        spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
        more = [""] * 3
        if "parameters" in runs[0]:
            means = [mean(run[key] for run in runs) for key in ("parameters", "seconds", "gib")]
            more = [
                pattern.format(value) for pattern, value in zip(("{:,.0f}", "{:.0f}", "{:.2f}"), means, strict=True)
            ]
        rows.append([name, f"{mean(scores):.1f}{spread}", str(len(runs)), *more])
    return format_table(rows)


def draw(results: dict[str, list[dict[str, Any]]], score: str, file: Path) -> None:
    """Draw the scores against the trained parameters, with their standard deviation, and the base as a line."""
    from matplotlib.figure import Figure  # here because the table needs none

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, runs in results.items():
        scores = [run["score"] for run in runs]
        if "parameters" not in runs[0]:
            axes.axhline(mean(scores), color="grey", linestyle="--", label=name)
            continue
        size, spread = runs[0]["parameters"], stdev(scores) if len(scores) > 1 else 0
        axes.errorbar(size, mean(scores), spread, fmt="o" if "soft" in name else "s", capsize=3, label=name)
    axes.set(xscale="log", xlabel="trained parameters", ylabel=score.replace("_", " "))
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    model_args, args = ScriptParser((ModelArguments, RecipeArguments), __doc__).parse()
    pages, folder = find_pages(args.report, "recipes"), Path(args.output_dir)
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(1, args.seeds + 1):
        for name in args.recipes.split(","):
            if name == "base" and seed > 1:  # which is greedy
                continue
            result = run_recipe(name, seed, model_args.model_path, args)
            if isinstance(result, str):
                warn(f"{name}, seed {seed}: {result}")
                continue
            results.setdefault(name, []).append(result)
            say(f"{name}, seed {seed}: {result}")
            text = json.dumps(vars(model_args) | vars(args) | {"results": results}, ensure_ascii=False, indent=2)
            (folder / "recipes.json").write_text(text + "\n", encoding="utf-8")
    if not results:
        fail("no run has given a score", 1)
    table = tabulate(results, args.score)
    say(f"\n{table}")
    write_table(pages, "recipes", table)
    if find_spec("matplotlib"):
        draw(results, args.score, folder / "recipes.png")


if __name__ == "__main__":
    main()
