"""Kill a training run with SIGKILL at random moments, resume it each time, and compare it with an undisturbed run.

    python tests/soak.py --kills 20
    python tests/soak.py --kills 10 --processes 2

For both methods, on models/tiny-qwen, with a checkpoint after every step. The weights must be equal, to the last bit.
Of several processes one is killed; the others must end within ten minutes.
"""

import argparse
import os
import random
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
RUN = "--save_steps 1 --per_device_train_batch_size 2 --learning_rate 1e-3 --logging_steps 1"


def start(script: str, flags: list[str], processes: int) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    launcher = torchrun if processes > 1 else ["-u"]
    command = [sys.executable, *launcher, str(REPOSITORY / script), *RUN.split(), *flags]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment | {"PYTHONUNBUFFERED": "1"}, **options)


def killed(script: str, flags: list[str], seconds: float, rank: int, processes: int) -> bool:
    """Run, and kill a process some seconds after the first step; returns whether it was killed before its end."""
    process = start(script, flags, processes)
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line[:7].strip().isdigit():  # a line of the log
            break
    victims = psutil.Process(process.pid).children() if processes > 1 else [process]
    time.sleep(seconds)
    with suppress(psutil.NoSuchProcess):
        victims[rank % len(victims)].send_signal(signal.SIGKILL)
    printed.append(process.communicate(timeout=600)[0])
    if process.returncode not in (0, -signal.SIGKILL) and "(SIGKILL)" not in printed[-1]:
        raise RuntimeError("".join(printed))
    return process.returncode != 0


def soak(script: str, steps: int, kills: int, seed: int, processes: int = 1) -> tuple[int, float]:
    """Returns how often the run was killed, and the largest difference of a weight from the undisturbed run's."""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder, "whole"), Path(folder, "broken")
        flags = ["--max_steps", str(steps), "--output_dir"]
        finish(script, [*flags, str(whole)], processes)
        count = 0
        for _ in range(kills):
            more, seconds, rank = how_to_continue(broken), generator.uniform(0, 0.4), generator.randrange(processes)
            if not killed(script, [*flags, str(broken), *more], seconds, rank, processes):
                break
            count += 1
            if (broken / "adapter_model.safetensors").exists() and not any(broken.glob("checkpoint-*")):
                break
        if any(broken.glob("checkpoint-*")):
            finish(script, [*flags, str(broken), *how_to_continue(broken)], processes)
        first, second = (load_file(path / "adapter_model.safetensors") for path in (whole, broken))
        return count, max((first[name] - second[name]).abs().max().item() for name in first)


def how_to_continue(folder: Path) -> list[str]:
    """Resume, or start anew if the run was killed before its first checkpoint was whole."""
    whole = any((checkpoint / "adapter_info.json").exists() for checkpoint in folder.glob("checkpoint-*"))
    return ["--resume_from_checkpoint" if whole else "--overwrite_output_dir", "True"]


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
        print(f"{script}: killed {count} times in {args.steps} steps; largest difference {difference}", flush=True)
        if difference:
            sys.exit(1)


if __name__ == "__main__":
    main()
