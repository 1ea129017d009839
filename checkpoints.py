"""What an output folder may already hold: files that must not be lost, and checkpoints to go on from."""

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from adapters import CONFIG, INFO, SCRATCH, WEIGHTS
from console import fail, first_line, is_disk_error, resume_command, warn

# What the Trainer writes, the adapter first; INFO is written last, by `CheckpointTrainer`.
STATE = "trainer_state.json"
PICKLES = ("optimizer.pt", "scheduler.pt")

# Fields of PEFT's configuration that say where and when it was made, not what the adapter is.
NOT_COMPARED = ("base_model_name_or_path", "inference_mode", "peft_version", "revision")


class CheckpointTrainer(Trainer):
    """The stock Trainer, whose checkpoints are whole or not there: written beside their place, and then renamed."""

    adapter_files: dict[str, str] = {}  # texts by name that make a checkpoint an adapter too, adapter_info.json last

    def _save_checkpoint(self, model: torch.nn.Module, trial: None) -> None:
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        scratch = folder / SCRATCH
        self.args.output_dir = str(scratch)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.state.best_model_checkpoint == str(scratch / name):
                    self.state.best_model_checkpoint = str(folder / name)
                    self.state.save_to_json(str(scratch / name / STATE))
                for file, text in self.adapter_files.items():
                    (scratch / name / file).write_text(text, encoding="utf-8")
                flush_to_disk(scratch / name)
                if (folder / name).exists():  # from the run that this one resumes, and not whole
                    shutil.rmtree(folder / name)
                os.replace(scratch / name, folder / name)
                # the number of a step, not the time of a file, says which is older
                rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_disk_error(error):
                raise
            free = shutil.disk_usage(folder).free / 2**20
            last = next((str(path) for path in find_checkpoints(folder) if not find_broken_part(path)), "none yet")
            fail(
                f"{folder / name} can not be written: {free:.1f} MB are free on its disk ({first_line(error)}).\n"
                f"The last whole checkpoint is {last}. Make room, and go on with: {resume_command()}",
                1,
            )
        finally:
            self.args.output_dir = str(folder)
            if self.args.should_save:
                remove_leftovers(str(folder))
        self.accelerator.wait_for_everyone()


def flush_to_disk(folder: Path) -> None:
    """Wait until the files are on the disk: a name must not outlive a power cut that its contents did not."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_output_dir(output_dir: str, told: bool) -> None:
    """Refuse an output folder that holds something, unless told to replace it or to go on from it."""
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        fail(f"--output_dir '{folder}' is a file; name a folder")
    if (folder / "config.json").exists():
        fail(f"--output_dir '{folder}' holds a model; name another folder, so that the model stays as it is")
    if told or not folder.is_dir() or all(path.name.startswith((".gitkeep", SCRATCH)) for path in folder.iterdir()):
        return
    kind = "an adapter" if (folder / WEIGHTS).exists() else "files"
    remedy = "name another folder, or add --overwrite_output_dir True to replace what it holds"
    if find_checkpoints(folder):
        kind = "checkpoints"
        remedy += "\nor --resume_from_checkpoint True to go on from the last checkpoint"
    fail(f"--output_dir '{folder}' already holds {kind}; {remedy}")


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, the latest step first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def remove_leftovers(output_dir: str) -> None:
    """Remove what a killed run was just writing."""
    for folder in Path(output_dir).glob(SCRATCH + "*"):
        shutil.rmtree(folder)


def remove_checkpoints(output_dir: str) -> None:
    for folder in find_checkpoints(output_dir):
        shutil.rmtree(folder)


def find_broken_part(folder: Path) -> str | None:
    """The first file that a checkpoint lacks, or that was only half written; None for a whole checkpoint."""
    for name in (CONFIG, WEIGHTS, *PICKLES, STATE, INFO):
        if not (folder / name).is_file():
            return f"{name} is missing"
    if not any(folder.glob("rng_state*.pth")):
        return "rng_state.pth is missing"
    try:
        for name in (CONFIG, STATE, INFO):
            json.loads((folder / name).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS, "pt"):  # compares the header with the file's size
            pass
    except (ValueError, SafetensorError):
        return f"{name if name != INFO else WEIGHTS} is broken"
    for path in [folder / name for name in PICKLES] + list(folder.glob("rng_state*.pth")):
        if not zipfile.is_zipfile(path):  # torch.save writes a zip file, whose table of contents comes last
            return f"{path.name} is broken"
    return None


def find_resume_checkpoint(training_args: TrainingArguments, model: PeftModel, info: dict[str, Any]) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` asks for: a folder, or True for the newest whole one.

    Args:
        info: adapter_info.json of the run that is about to start.

    Raises:
        SystemExit: code 2, where there is none, or it is of another adapter, base model or data file.
    """
    wanted = training_args.resume_from_checkpoint
    if not wanted or wanted.lower() == "false":
        return None
    candidates = find_checkpoints(training_args.output_dir) if wanted.lower() == "true" else [Path(wanted)]
    for folder in candidates:
        broken = find_broken_part(folder)
        if broken is None:
            break
        warn(f"checkpoint '{folder}' is not whole ({broken})")
    else:
        fail(f"--resume_from_checkpoint {wanted}: there is no whole checkpoint to go on from; leave the flag out")

    remedy = "repeat the first command, or start anew with another --output_dir"
    saved = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    current = model.peft_config["default"].to_dict()
    for name in sorted(current.keys() - set(NOT_COMPARED)):
        value = sorted(current[name]) if isinstance(current[name], set) else current[name]
        old = sorted(saved[name]) if isinstance(current[name], set) else saved.get(name)
        if old != json.loads(json.dumps(value)):
            fail(f"'{folder}' was trained with {name} {old}, not {value}; {remedy}")
    saved_info = json.loads((folder / INFO).read_text(encoding="utf-8"))
    for name in ("base_fingerprint", "quantization", "data_sha256", "prompt_format"):
        if saved_info[name] != info[name]:
            fail(f"'{folder}' was trained with another {name}; {remedy}")
    return str(folder)
