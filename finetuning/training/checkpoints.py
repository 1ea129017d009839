"""Write complete checkpoints, choose the one to resume from, and guard the output folder.

The Trainer writes a checkpoint; `CheckpointWriter` then adds `adapter_info.json`, when everything else is on the disk,
with the size of each file. A checkpoint without it is partial, one with files of other sizes is damaged.
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
from finetuning.cli.console import fail, is_disk_error, say, warn
from finetuning.distributed import engine_asked_for
from finetuning.model.fingerprint import compare_fingerprints
from finetuning.model.folder import (
    CARD,
    CONFIG,
    CONFUSION,
    CURVE,
    INFO,
    METRICS,
    REPORT,
    RESUME,
    SCRATCH,
    TEMPLATE,
    WEIGHTS,
    adapter_state,
    describe_disk_error,
    find_broken_part,
    find_checkpoints,
    flush_to_disk,
    last_complete,
    step_of_name,
    write_adapter,
)
from finetuning.model.hub import create_repository
from finetuning.training.flags import Arguments

# Fields of PEFT's configuration that say when and where it was made, not what the adapter is.
NOT_COMPARED = ("base_model_name_or_path", "inference_mode", "peft_version", "revision")
# How the flags begin that a resumed run may change: reports, evaluation, memory and where it runs. All others must
# stay, also those of a later transformers. What came of data_path and prompt_format is compared instead of them.
MAY_CHANGE = """
output_dir resume_ bf16_full_ fp16_full_ use_ full_determinism activation_ gradient_checkpointing torch_ liger_
auto_find_ log report_to run_name project trackio_ disable_tqdm include_ debug do_ skip_memory_ eval_st eval_delay
eval_on_ eval_do_ eval_use_ eval_acc eval_data_path per_device_eval_ prediction_loss_only batch_eval_ load_best_
metric_for_ greater_is_ save_ enable_jit_ restore_ push_ hub_ local_rank ddp_ fsdp deepspeed parallelism_
dataloader_num_ dataloader_p dataloader_m dataloader_in_ remove_unused_ label_names length_ data_path prompt_format
show_rows preprocessing_ token_cache_
"""
ROWS = ("per_device_train_batch_size", "gradient_accumulation_steps")


def run_settings(args: Arguments) -> dict[str, Any]:
    """What a resumed run must share, to be saved in adapter_info.json."""
    flags = args.training.to_dict() | vars(args.data)
    settings = {name: value for name, value in flags.items() if not name.startswith(tuple(MAY_CHANGE.split()))}
    (settings["accelerator_config"] or {}).pop("non_blocking", None)  # of copies to a GPU
    settings["loraplus_lr_ratio"] = vars(args.method).get("loraplus_lr_ratio")  # PEFT's configuration has the others
    return settings | {"processes": args.training.world_size, "engine": engine_asked_for(args.training)}


def must_match(config: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint and a run that resumes it must share, in one dictionary, by the names that a message gives it.

    Args:
        config: of PEFT.
        info: the contents of adapter_info.json. Older ones lack some settings; what one side lacks is not compared.
    """
    shared = {name: value for name, value in config.items() if name not in NOT_COMPARED}
    shared = {name: sorted(value) if isinstance(value, list) else value for name, value in shared.items()}
    names = ("quantization", "data_sha256", "prompt_format", "tokens")
    shared |= {name: info[name] for name in names if name in info}
    if "settings" in info:
        settings = {"engine": None, "processes": 1} | info["settings"]
        engine, processes = settings.pop("engine"), settings.pop("processes")
        # the rows of a step stay the same, in whichever way batches, accumulation and processes divide them
        rows = math.prod(settings.pop(name) for name in ROWS) * processes
        shared |= {f"--{name}": value for name, value in settings.items()}
        shared |= {"engine": engine, f"rows a step (--{' x --'.join(ROWS)} x processes)": rows}
        if engine == "DeepSpeed":
            shared["processes"] = processes  # each of which reads the part that it wrote
    return shared


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """How two dictionaries of `must_match` differ, as parts of a message."""
    names = sorted(saved.keys() & current.keys())
    return [f"{name} {saved[name]}, not {current[name]}" for name in names if saved[name] != current[name]]


class CheckpointWriter(TrainerCallback):
    """Makes each checkpoint of the Trainer an adapter too, marks it as complete, and then removes the oldest.

    Args:
        adapter_files: texts by file name, `adapter_info.json` among them.
        save_total_limit: how many checkpoints to keep; None for all.
    """

    def __init__(self, adapter_files: dict[str, str], save_total_limit: int | None) -> None:
        self.adapter_files = adapter_files
        self.save_total_limit = save_total_limit

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.saved_at = 0  # the step of the last checkpoint; training begins anew if --auto_find_batch_size needs it

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set a checkpoint of the same step aside: until the new one is complete, it may be the only one."""
        if control.should_save:
            folder = checkpoint_folder(args.output_dir, state.global_step)
            if args.should_save and folder.exists():
                shutil.rmtree(aside(folder), ignore_errors=True)
                folder.rename(aside(folder))
            PartialState().wait_for_everyone()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save again what a signal has had saved after the epoch's last step only if the epoch's evaluation is new."""
        if self.saved_at == state.global_step and not control.should_evaluate:
            control.should_save = False
        self.on_step_end(args, state, control)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: PeftModel, **kwargs: Any
    ) -> None:
        weights = adapter_state(model)
        self.saved_at = state.global_step
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
        shutil.rmtree(aside(folder), ignore_errors=True)
        # by the number of the step: copied files may have any time
        rotate_checkpoints(args.output_dir, self.save_total_limit, state.best_model_checkpoint)


def aside(folder: Path) -> Path:
    """The other name of a checkpoint that is written again, by which it can still be resumed from."""
    return folder.with_name(f"{folder.name}-before")


def checkpoint_folder(output_dir: str, step: int) -> Path:
    return Path(output_dir, f"checkpoint-{step}")


def explain_failed_write(error: Exception, output_dir: str, step: int) -> None:
    """If `error` is a checkpoint that could not be written, delete what there is of it, and exit with the remedy."""
    folder = checkpoint_folder(output_dir, step)
    half_written = folder.is_dir() and find_broken_part(folder)
    if not is_disk_error(error) or not (half_written or str(folder) in str(error)):
        return
    shutil.rmtree(folder, ignore_errors=True)
    last = last_complete(output_dir) or "none yet"
    fail(
        f"{describe_disk_error(folder, error)}\nThe last complete checkpoint is {last}. {RESUME} {resume_command()}", 1
    )


def prepare_output_dir(args: Arguments) -> None:
    """Refuse an output folder that is in use; choose the checkpoint to resume from, and create the repository."""
    training, only_looks = args.training, args.run.dry_run or args.data.show_rows
    allowed = only_looks or args.run.overwrite_output_dir or training.resume_from_checkpoint
    check_output_dir(training.output_dir, allowed=bool(allowed))
    if training.resume_from_checkpoint and not only_looks:
        chosen = choose_checkpoint(training.output_dir, training.resume_from_checkpoint)
        training.resume_from_checkpoint = str(chosen)
    if args.push_to_hub and not only_looks:
        names = training.hub_model_id, training.output_dir
        training.hub_model_id = create_repository(*names, training.hub_token, training.hub_private_repo)


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
    if last_complete(folder):
        kind = "checkpoints"
        remedy += "\nor --resume_from_checkpoint True to resume from the last checkpoint"
    elif find_checkpoints(folder):
        kind = "checkpoints, none of them complete"
    fail(f"--output_dir '{folder}' already holds {kind}; {remedy}")


def clear_output_dir(output_dir: str, overwrite: bool, resumed_at: int) -> None:
    """Remove what a killed run was still writing, and what this run will not continue.

    To overwrite, these are the checkpoints, scores and report of another run; to resume, the checkpoints after the step
    `resumed_at`. They may be partial, and as the highest they would outlive the complete ones.
    """
    later = [path for path in find_checkpoints(output_dir) if resumed_at and step_of_name(path) > resumed_at]
    for folder in (*later, *Path(output_dir).glob(SCRATCH + "*")):
        shutil.rmtree(folder)
    if later:
        say(f"resumed at step {resumed_at}; removed: {', '.join(folder.name for folder in later)}")
    if overwrite:
        remove_checkpoints(output_dir)
        for name in (METRICS, CONFUSION, REPORT, CURVE, CARD):
            Path(output_dir, name).unlink(missing_ok=True)


def saved_step(checkpoint: str | None) -> int:
    """The step after which a complete checkpoint was written, whatever its folder is called; 0 for none."""
    if not checkpoint:
        return 0
    return json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]


def remove_checkpoints(output_dir: str) -> None:
    for folder in find_checkpoints(output_dir):
        shutil.rmtree(folder)


def choose_checkpoint(output_dir: str, wanted: str) -> Path:
    """The folder `wanted` or, for "True", the newest complete checkpoint; exits with code 2 if there is none."""
    for folder in find_checkpoints(output_dir) if wanted.lower() == "true" else [Path(wanted)]:
        is_state = (folder / TRAINER_STATE_NAME).is_file()  # of which a finished adapter has none
        broken = find_broken_part(folder) if is_state else f"{TRAINER_STATE_NAME} is missing"
        if broken is None:
            return folder
        warn(f"checkpoint '{folder}' is not complete ({broken})")
    if last := last_complete(output_dir):
        fail(f"--resume_from_checkpoint {wanted}: this is no complete checkpoint; write True, for {last}")
    fail(
        f"--resume_from_checkpoint {wanted}: there is no complete checkpoint to resume from;\n"
        "leave the flag out, or start anew with --overwrite_output_dir True"
    )


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
    folder = choose_checkpoint(output_dir, wanted)
    config, saved = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (CONFIG, INFO))
    own_config = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=sorted))  # sets as lists
    info = json.loads(adapter_files[INFO])
    found = differences(must_match(config, saved), must_match(own_config, info))
    if (folder / TEMPLATE).read_text(encoding="utf-8") != adapter_files[TEMPLATE]:
        found.insert(0, "another chat template")
    if difference := compare_fingerprints(saved["base_fingerprint"], info["base_fingerprint"]):
        found.insert(0, f"another base model: {difference}")
    if found:
        remedy = "Repeat the first command, or start anew with another --output_dir"
        fail(f"'{folder}' was trained with {'; '.join(found)}.\n{remedy}")
    old, new = (its.get("settings", {}).get("processes", 1) for its in (saved, info))
    if old != new:
        say(f"resumed with {new} process(es) instead of {old}: each step keeps its rows, dropout draws other numbers")
    return str(folder)
