"""End a training run with SIGKILL or SIGTERM at random moments, resume it each time; it must equal an undisturbed run.

    python tests/soak.py --kills 20
    python tests/soak.py --kills 10 --processes 2

For both methods, on models/tiny-qwen, with a checkpoint after every step and room for one. After each signal the last
complete checkpoint must be there still, or a later one; sometimes a partial one is put beside it. In the end the
weights must be equal, to the last bit. Of several processes one gets it; the others must end within ten minutes.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = ("train_lora.py", "train_prompt_tuning.py")
RUN = "--save_steps 1 --save_total_limit 1 --per_device_train_batch_size 2 --learning_rate 1e-3 --logging_steps 1"


def start(script: str, flags: list[str], processes: int) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    launcher = torchrun if processes > 1 else ["-u"]
    command = [sys.executable, *launcher, str(REPOSITORY / script), *RUN.split(), *flags]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment | {"PYTHONUNBUFFERED": "1"}, **options)


def ended(script: str, flags: list[str], number: int, seconds: float, rank: int, processes: int) -> bool:
    """Run, and send a process a signal some seconds after the first step; returns whether it came before the end."""
    process = start(script, flags, processes)
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line[:7].strip().isdigit():  # a line of the log
            break
    victims = psutil.Process(process.pid).children() if processes > 1 else [process]
    time.sleep(seconds)
    with suppress(psutil.NoSuchProcess):
        victims[rank % len(victims)].send_signal(number)
    printed.append(process.communicate(timeout=600)[0])
    codes = (0, -number, 128 + number)
    if process.returncode not in codes and not any(word in printed[-1] for word in ("(SIGKILL)", "exitcode  : 143")):
        raise RuntimeError("".join(printed))
    return process.returncode != 0


def soak(script: str, steps: int, kills: int, seed: int, processes: int = 1) -> tuple[int, float]:
    """Returns how often the run was ended, and the largest difference of a weight from the undisturbed run's."""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder, "whole"), Path(folder, "broken")
        flags = ["--max_steps", str(steps), "--output_dir"]
        finish(script, [*flags, str(whole)], processes)
        count = 0
        for _ in range(kills):
            before, number = last_complete(broken), generator.choice((signal.SIGKILL, signal.SIGTERM))
            seconds, rank = generator.uniform(0, 0.4), generator.randrange(processes)
            more = [*flags, str(broken), *how_to_continue(before)]
            if not ended(script, more, number, seconds, rank, processes):
                break
            count += 1
            last, finished = last_complete(broken), (broken / "adapter_model.safetensors").exists()
            if last < before and not finished:
                raise RuntimeError(f"step {before} was complete; after signal {number}, {last} is the last that is")
            if finished and not any(broken.glob("checkpoint-*")):
                break
            if last and generator.random() < 0.5:
                half = broken / f"checkpoint-{last + 1}"
                shutil.copytree(broken / f"checkpoint-{last}", half, dirs_exist_ok=True)
                (half / generator.choice(("optimizer.pt", "adapter_info.json"))).unlink()
        if any(broken.glob("checkpoint-*")):
            finish(script, [*flags, str(broken), *how_to_continue(last_complete(broken))], processes)
        first, second = (load_file(path / "adapter_model.safetensors") for path in (whole, broken))
        return count, max((first[name] - second[name]).abs().max().item() for name in first)


def last_complete(folder: Path) -> int:
    """The last step whose checkpoint has all its files, in their sizes; 0 if there is none."""
    steps = [0]
    for checkpoint in folder.glob("checkpoint-*"):
        with suppress(OSError, ValueError):  # missing files, half a JSON file
            files = json.loads((checkpoint / "adapter_info.json").read_text(encoding="utf-8"))["files"]
            if all((checkpoint / name).stat().st_size == size for name, size in files.items()):
                steps.append(int(checkpoint.name.split("-")[1]))
    return max(steps)


def how_to_continue(step: int) -> list[str]:
    """Resume, or start anew if the run was ended before its first checkpoint was complete."""
    return ["--resume_from_checkpoint" if step else "--overwrite_output_dir", "True"]


def finish(script: str, flags: list[str], processes: int) -> None:
    process = start(script, flags, processes)
    printed = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(printed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="for each method")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="started by torchrun, if there are several")
    args = parser.parse_args()
    for script in SCRIPTS:
        count, difference = soak(script, args.steps, args.kills, args.seed, args.processes)
        print(f"{script}: ended {count} times in {args.steps} steps; largest difference {difference}", flush=True)
        if difference:
            sys.exit(1)


if __name__ == "__main__":
    main()
