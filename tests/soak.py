"""Kill a training run with SIGKILL at random moments, resume it each time, and compare it with an undisturbed run.

    python tests/soak.py --kills 20

For both methods, on models/tiny-qwen, with a checkpoint after every step. The weights must be equal, to the last bit.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = ("train_lora.py", "train_prompt_tuning.py")
RUN = "--save_steps 1 --per_device_train_batch_size 2 --learning_rate 1e-3 --logging_steps 1"


def start(script: str, flags: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-u", str(REPOSITORY / script), *RUN.split(), *flags]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, **options)


def killed(script: str, flags: list[str], seconds: float) -> bool:
    """Run, and kill the run some seconds after its first step; returns whether it was killed before its end."""
    process = start(script, flags)
    printed = []
    for line in process.stdout:
        printed.append(line)
        if "'loss'" in line:
            break
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    printed.append(process.stdout.read())
    code = process.wait()
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError("".join(printed))
    return code != 0


def soak(script: str, steps: int, kills: int, seed: int) -> tuple[int, float]:
    """Returns how often the run was killed, and the largest difference of a weight from the undisturbed run's."""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder, "whole"), Path(folder, "broken")
        flags = ["--max_steps", str(steps), "--output_dir"]
        finish(script, [*flags, str(whole)])
        count = 0
        for _ in range(kills):
            if not killed(script, [*flags, str(broken), *how_to_continue(broken)], generator.uniform(0, 0.4)):
                break
            count += 1
            if (broken / "adapter_model.safetensors").exists() and not any(broken.glob("checkpoint-*")):
                break
        if any(broken.glob("checkpoint-*")):
            finish(script, [*flags, str(broken), *how_to_continue(broken)])
        first, second = (load_file(path / "adapter_model.safetensors") for path in (whole, broken))
        return count, max((first[name] - second[name]).abs().max().item() for name in first)


def how_to_continue(folder: Path) -> list[str]:
    """Resume, or start anew if the run was killed before its first checkpoint was whole."""
    whole = any((checkpoint / "adapter_info.json").exists() for checkpoint in folder.glob("checkpoint-*"))
    return ["--resume_from_checkpoint" if whole else "--overwrite_output_dir", "True"]


def finish(script: str, flags: list[str]) -> None:
    process = start(script, flags)
    printed = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(printed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="for each method")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for script in SCRIPTS:
        count, difference = soak(script, args.steps, args.kills, args.seed)
        print(f"{script}: killed {count} times in {args.steps} steps; largest difference {difference}", flush=True)
        if difference:
            sys.exit(1)


if __name__ == "__main__":
    main()
