"""Prepare many rows for training, and compare with the tokenizer alone: time, memory, and the second start.

    python tests/many_rows.py --model_path path/to/qwen --rows 1000000

The rows, of 125 bytes to 2 kB, are made of the sample data and written to a temporary folder; nothing is trained. The
tokenizer alone gets the same texts, already rendered, in batches of 10,000 and with as many threads.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
GB = 10**9


def write_rows(path: Path, count: int) -> None:
    texts = [row["output"] or "-" for row in json.loads((REPOSITORY / "data/train.json").read_text(encoding="utf-8"))]
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            length, words = generator.randint(30, 1900), []
            while length > 0:
                words.append(generator.choice(texts))
                length -= len(words[-1].encode())
            row = {"instruction": "翻译为英文", "input": str(number), "output": " ".join(words)}
            file.write(("[" if number == 0 else ",\n") + json.dumps(row, ensure_ascii=False))
        file.write("]\n")


def measure(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds, CPU-seconds and peak memory in GB, children included; shared memory is counted once."""
    process, peak, done = psutil.Process(), 0, False

    def watch() -> None:
        nonlocal peak
        while not done:
            total = 0
            for each in [process, *process.children(recursive=True)]:
                try:
                    total += each.memory_full_info().pss
                except psutil.Error:  # it has ended meanwhile
                    pass
            peak = max(peak, total)
            time.sleep(1)

    before = process.memory_full_info().pss
    watcher = Thread(target=watch)
    watcher.start()
    start, cpu = time.perf_counter(), sum(os.times()[:4])
    try:
        work()
        figures = {"seconds": time.perf_counter() - start, "CPU-seconds": sum(os.times()[:4]) - cpu}
    finally:
        done = True
        watcher.join()
    return figures | {"GB before": before / GB, "peak GB": peak / GB}


def tokenizer_alone(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    from common import load_tokenizer
    from finetuning.cli.arguments import ModelArguments
    from finetuning.preprocessing.encode import to_messages
    from finetuning.preprocessing.readers import read_file

    tokenizer = load_tokenizer(ModelArguments(args.model_path), "auto")
    total = {"seconds": 0.0, "CPU-seconds": 0.0}
    texts: list[str] = []
    for number, (_, row) in enumerate(read_file(str(folder / "rows.json"), ()), 1):
        texts.append(tokenizer.apply_chat_template(to_messages(row, tokenizer), tokenize=False))
        if len(texts) == 10_000 or number == args.rows:
            figures = measure(lambda: tokenizer(texts))
            total = {name: total[name] + figures[name] for name in total}
            texts.clear()
    return total


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    from common import load_tokenizer, preprocess_function
    from finetuning.cli.arguments import ModelArguments
    from finetuning.preprocessing.dataset import load_training_data
    from finetuning.preprocessing.flags import DataArguments

    tokenizer = load_tokenizer(ModelArguments(args.model_path), "auto")
    data = DataArguments(data_path=str(folder / "rows.json"), token_cache_dir=str(folder / "cache"), token_cache_gb=100)
    data.preprocessing_num_workers = args.threads
    return measure(lambda: load_training_data(data, preprocess_function, tokenizer, 42))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default=str(REPOSITORY / "models/tiny-qwen"))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", choices=["tokenizer_alone", "prepare"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(globals()[args.only](args, Path(args.folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder, "rows.json"), args.rows)
        print(f"{args.rows:,} rows, {Path(folder, 'rows.json').stat().st_size / GB:.2f} GB", flush=True)
        environment = os.environ | {"RAYON_NUM_THREADS": str(args.threads)}
        for name, only in [("tokenizer alone", "tokenizer_alone"), ("prepared", "prepare"), ("again", "prepare")]:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", only, "--folder", folder]
            result = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
            figures = json.loads(result.stdout.splitlines()[-1])
            print(f"{name:16}", ", ".join(f"{value:.1f} {unit}" for unit, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
