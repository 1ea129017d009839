"""Write complete checkpoints, choose the one to resume from, and guard the output folder.

The Trainer writes a checkpoint; `CheckpointWriter` then adds `adapter_info.json`, when everything else is on the disk,
with the size of each file. A checkpoint without it is half written, one with files of other sizes is damaged.
"""

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from finetuning.cli.commands import resume_command
from finetuning.cli.console import fail, first_line, is_disk_error, say, warn
from finetuning.distributed import engine_asked_for
from finetuning.model.fingerprint import compare_fingerprints
from finetuning.model.folder import (
    CONFIG,
    CONFUSION,
    CURVE,
    INFO,
    METRICS,
    REPORT,
    SCRATCH,
    WEIGHTS,
    adapter_state,
    find_broken_part,
    find_checkpoints,
    flush_to_disk,
    step_of_name,
    write_adapter,
)
from finetuning.training.flags import Arguments

# Fields of PEFT's configuration that say when and where it was made, not what the adapter is.
NOT_COMPARED = ("base_model_name_or_path", "inference_mode", "peft_version", "revision")

# Fields of TrainingArguments that a resumed run must share; with another number of processes, the rows of a step.
ROWS = ("per_device_train_batch_size", "gradient_accumulation_steps")
RUN_SETTINGS = ("seed", *ROWS, "learning_rate")


def run_settings(args: Arguments) -> dict[str, Any]:
    """What a resumed run must share, to be saved in adapter_info.json."""
    settings = {name: getattr(args.training, name) for name in RUN_SETTINGS}
    settings |= {"processes": args.training.world_size, "engine": engine_asked_for(args.training)}
    return settings | {"max_length": args.data.max_length, "thinking": args.data.thinking}


class CheckpointWriter(TrainerCallback):
    """Makes each checkpoint of the Trainer an adapter too, marks it as complete, and then removes the oldest.

    Args:
        adapter_files: texts by file name, `adapter_info.json` among them.
        save_total_limit: how many checkpoints to keep; None for all.
    """

    def __init__(self, adapter_files: dict[str, str], save_total_limit: int | None) -> None:
        self.adapter_files = adapter_files
        self.save_total_limit = save_total_limit

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove a checkpoint of the same step, which the resumed run had left, before the new one is written."""
        if control.should_save:
            folder = checkpoint_folder(args.output_dir, state.global_step)
            if args.should_save and folder.exists():
                shutil.rmtree(folder)
            PartialState().wait_for_everyone()

    on_epoch_end = on_step_end

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: PeftModel, **kwargs: Any
    ) -> None:
        weights = adapter_state(model)
        PartialState().wait_for_everyone()  # each process writes its own random state
        if not args.should_save:
            return
        folder = checkpoint_folder(args.output_dir, state.global_step)
        if not (folder / WEIGHTS).exists():  # with FSDP the Trainer leaves it to us
            write_adapter(model, weights, folder)
        for name, text in self.adapter_files.items():
            if name != INFO:
                (folder / name).write_text(text, encoding="utf-8")
        flush_to_disk(folder)
        written = [path for path in folder.rglob("*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in written}
        info = json.loads(self.adapter_files[INFO]) | {"files": files}
        (folder / INFO).write_text(json.dumps(info, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        flush_to_disk(folder)
        # by the number of the step: copied files may have any time
        rotate_checkpoints(args.output_dir, self.save_total_limit, state.best_model_checkpoint)


def checkpoint_folder(output_dir: str, step: int) -> Path:
    return Path(output_dir, f"checkpoint-{step}")


def explain_failed_write(error: Exception, output_dir: str, step: int) -> None:
    """If `error` is a checkpoint that could not be written, delete what there is of it, and exit with the remedy."""
    folder = checkpoint_folder(output_dir, step)
    half_written = folder.is_dir() and find_broken_part(folder)
    if not is_disk_error(error) or not (half_written or str(folder) in str(error)):
        return
    shutil.rmtree(folder, ignore_errors=True)
    free = shutil.disk_usage(output_dir).free / 2**20
    last = next((str(path) for path in find_checkpoints(output_dir) if not find_broken_part(path)), "none yet")
    fail(
        f"{folder} cannot be written: {free:.1f} MB are free on its disk ({first_line(error)}).\n"
        f"The last whole checkpoint is {last}. Make room, and resume with: {resume_command()}",
        1,
    )


def check_output_dir(output_dir: str, allowed: bool) -> None:
    """Refuse an output folder that is in use, unless its contents may be replaced or resumed."""
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        fail(f"--output_dir '{folder}' is a file; name a folder")
    try:  # before minutes of loading
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        fail(f"--output_dir '{folder}' cannot be written: {error.strerror}; name another folder")
    if (folder / "config.json").exists():
        fail(f"--output_dir '{folder}' holds a model; name another folder, so that the model stays as it is")
    if allowed or not folder.is_dir() or all(path.name.startswith((".gitkeep", SCRATCH)) for path in folder.iterdir()):
        return
    kind = "an adapter" if (folder / WEIGHTS).exists() else "files"
    remedy = "name another folder, or add --overwrite_output_dir True to replace what it holds"
    checkpoints = find_checkpoints(folder)
    if checkpoints:
        kind = "checkpoints"
        if all(find_broken_part(checkpoint) for checkpoint in checkpoints):
            kind += ", none of them whole"
        else:
            remedy += "\nor --resume_from_checkpoint True to resume from the last checkpoint"
    fail(f"--output_dir '{folder}' already holds {kind}; {remedy}")


def clear_output_dir(output_dir: str, overwrite: bool, resumed_at: int) -> None:
    """Remove what a killed run was still writing, and what this run will not continue.

    To overwrite, these are the checkpoints, scores and report of another run; to resume, the checkpoints after the step
    `resumed_at`. They may be half written, and as the highest they would outlive the complete ones.
    """
    for folder in Path(output_dir).glob(SCRATCH + "*"):
        shutil.rmtree(folder)
    later = [path for path in find_checkpoints(output_dir) if resumed_at and step_of_name(path) > resumed_at]
    for folder in later:
        shutil.rmtree(folder)
    if later:
        say(f"resumed at step {resumed_at}; removed: {', '.join(folder.name for folder in later)}")
    if overwrite:
        remove_checkpoints(output_dir)
        for name in (METRICS, CONFUSION, REPORT, CURVE):
            Path(output_dir, name).unlink(missing_ok=True)


def saved_step(checkpoint: str | None) -> int:
    """The step after which a complete checkpoint was written, whatever its folder is called; 0 for none."""
    if not checkpoint:
        return 0
    return json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]


def remove_checkpoints(output_dir: str) -> None:
    for folder in find_checkpoints(output_dir):
        shutil.rmtree(folder)


def find_resume_checkpoint(
    output_dir: str, wanted: str | None, model: PeftModel, adapter_files: dict[str, str]
) -> str | None:
    """The checkpoint to resume from.

    Args:
        wanted: `--resume_from_checkpoint`: a folder, or "True" for the newest complete checkpoint; None for none.
        adapter_files: those of the run that is about to start, from `describe_adapter`.

    Raises:
        SystemExit: code 2, if there is none, or it is of another adapter, base model or data file.
    """
    if not wanted:
        return None
    candidates = find_checkpoints(output_dir) if wanted.lower() == "true" else [Path(wanted)]
    for folder in candidates:
        broken = find_broken_part(folder)
        if broken is None:
            break
        warn(f"checkpoint '{folder}' is not whole ({broken})")
    else:
        fail(
            f"--resume_from_checkpoint {wanted}: there is no whole checkpoint to resume from;\n"
            "leave the flag out, or start anew with --overwrite_output_dir True"
        )

    remedy = "repeat the first command, or start anew with another --output_dir"
    saved = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    current = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=sorted))  # sets as lists
    for name in sorted(current.keys() - set(NOT_COMPARED)):
        old, value = (sorted(it) if isinstance(it, list) else it for it in (saved.get(name), current[name]))
        if old != value:
            fail(f"'{folder}' was trained with {name} {old}, not {value}; {remedy}")
    saved_info, info = json.loads((folder / INFO).read_text(encoding="utf-8")), json.loads(adapter_files[INFO])
    difference = compare_fingerprints(saved_info["base_fingerprint"], info["base_fingerprint"])
    if difference:
        fail(f"'{folder}' was trained on another base model: {difference}; {remedy}")
    for name in ("quantization", "data_sha256", "prompt_format"):
        if saved_info[name] != info[name]:
            fail(f"'{folder}' was trained with another {name}; {remedy}")
    check_settings(folder, saved_info.get("settings", {}), info["settings"], remedy)
    return str(folder)


def check_settings(folder: Path, saved: dict[str, Any], current: dict[str, Any], remedy: str) -> None:
    """Refuse to resume a checkpoint with other settings; print what another number of processes changes."""
    saved = {"engine": None, "processes": 1} | saved  # older ones lack these
    old, new = (settings["engine"] or "whole weights" for settings in (saved, current))
    if old != new:
        fail(f"'{folder}' was trained with {old}, and this run has {new}: their checkpoints differ; {remedy}")
    before, now = saved["processes"], current["processes"]
    names = saved.keys() - {"engine", "processes"}
    if before != now:
        if old == "DeepSpeed":
            fail(f"'{folder}' was trained with {before} processes, and DeepSpeed resumes with as many; {remedy}")
        rows, these = (math.prod(settings[name] for name in (*ROWS, "processes")) for settings in (saved, current))
        if rows != these:
            fail(
                f"'{folder}' was trained with {rows} rows a step in {before} process(es); {now} now have {these}: set "
                f"--per_device_train_batch_size and --gradient_accumulation_steps so that it stays {rows}"
            )
        say(
            f"resumed with {now} process(es) instead of {before}: each step keeps its rows, dropout draws other numbers"
        )
        names -= set(ROWS)
    for name in sorted(names):
        if saved[name] != current.get(name):
            fail(f"'{folder}' was trained with --{name} {saved[name]}, not {current.get(name)}; {remedy}")
