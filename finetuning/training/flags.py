"""The flags of the training scripts, checked before anything is loaded."""

import gc
import logging
import os
import warnings
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from finetuning.cli.arguments import ModelArguments, ScriptParser, flag
from finetuning.cli.console import fact, fail, first_line, is_main_process, say
from finetuning.cli.memory import is_out_of_memory
from finetuning.distributed import check_engine, count_processes, engine_asked_for, say_how_many
from finetuning.preprocessing.flags import DataArguments

# Liger's RMSNorm, SwiGLU and RoPE keep less for the backward pass. Its losses would replace ours (losses.py).
LIGER_KERNELS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
# With checkpointing, the inputs of the layers wait in main memory for the backward pass.
OFFLOAD = """--activation_checkpointing_kwargs '{"offload": true}'"""
# Of trackers, `--report_to`: what to import and what to install, if they are not called as the flag has it.
PACKAGES = {"azure_ml": ("azureml", "azureml-mlflow"), "comet_ml": ("comet_ml", "comet-ml"), "flyte": ("flytekit",) * 2}
# Trackers that may need a key or a server, and how to do without.
REMEDIES = {
    "mlflow": "To record on this machine: MLFLOW_TRACKING_URI=sqlite:///mlflow.db",
    "swanlab": "To log in: swanlab login; to record on this machine: SWANLAB_MODE=offline",
    "wandb": "To log in: wandb login; to record on this machine: WANDB_MODE=offline",
}
OFFLINE_MODES = ("offline", "local", "disabled")


@dataclass
class RunArguments:
    _argument_group_name = "run and output"

    overwrite_output_dir: bool = flag(False, "replace the adapter and the checkpoints in --output_dir")
    dry_run: bool = flag(False, "measure the memory that the longest rows need, and the time of the run; train nothing")
    eval_metrics: bool = flag(True, "after training, answer the rows to evaluate on and score the answers")
    sample_answers: int = flag(
        3, "after training, show so many rows with the answers of the base model and of the adapter; 0 for none"
    )
    keep_checkpoints: bool = flag(False, "keep the checkpoints of a finished run; each is about as large as 3 adapters")


@dataclass
class Arguments:
    """The command line of a training script, in its groups."""

    model: ModelArguments
    data: DataArguments
    run: RunArguments
    method: Any  # the method's own dataclass
    training: TrainingArguments  # and what is not left to the Trainer, though it has flags for them:
    push_to_hub: bool  # only the finished adapter
    save_total_limit: int | None  # an old checkpoint is removed after the new one is written

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen base weights: float16 only together with fp16's loss scaling (gradients underflow)."""
        return torch.float16 if self.training.fp16 else torch.bfloat16 if self.training.bf16 else torch.float32


def parse_arguments(
    method_arguments: type, description: str | None, argv: list[str] | None = None, **defaults: Any
) -> Arguments:
    """Parse a training script's command line, with the method's defaults for TrainingArguments, and settle precision
    and device."""
    groups = (ModelArguments, DataArguments, RunArguments, method_arguments, TrainingArguments)
    parser = ScriptParser(groups, description)
    parser.set_defaults(
        fp16=True,
        logging_steps=10,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # the filter would log a NaN loss as 0.0
        save_steps=200,
        dataloader_num_workers=2 if torch.cuda.is_available() else 0,  # batches are made while the GPU works
        save_total_limit=2,
        eval_strategy=None,  # left out: epoch if there are rows to evaluate on
        hub_strategy="end",
        ddp_find_unused_parameters=False,  # every trained parameter takes part in every forward
        remove_unused_columns=False,  # the row numbers are for the messages of NotFiniteGuard
        do_train=True,
        prediction_loss_only=True,  # or an evaluation would gather rows x length x 152k logits
        **defaults,
    )
    flags = parser.parse_flags(argv)
    on_cuda = torch.cuda.is_available() and not flags.use_cpu
    has_bf16 = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if flags.bf16 and on_cuda and not has_bf16:
        fail("--bf16 True: this GPU has no bfloat16 (Ampere and later have); leave it out, and train in float16")
    flags.bf16 = flags.bf16 and on_cuda
    flags.fp16 = flags.fp16 and on_cuda and not flags.bf16
    flags.use_cpu = flags.use_cpu or not torch.accelerator.is_available()  # or torchrun's processes would not be joined
    flags.dataloader_pin_memory = flags.dataloader_pin_memory and on_cuda
    if flags.dataloader_pin_memory and flags.accelerator_config is None:
        flags.accelerator_config = {"non_blocking": True}  # a batch is copied to the GPU while it works
    if flags.use_liger_kernel:
        if not (on_cuda and find_spec("liger_kernel")):
            fail("--use_liger_kernel needs a GPU and a package: pip install liger-kernel, or leave the flag out")
        flags.liger_kernel_config = LIGER_KERNELS
    if isinstance(flags.report_to, str):
        flags.report_to = flags.report_to.replace(" ", "").split(",")  # several, commas between
    evaluates = bool(flags.eval_data_path or flags.eval_split)
    if flags.eval_strategy is None:
        flags.eval_strategy = "epoch" if evaluates else "no"
    if flags.load_best_model_at_end or flags.save_strategy == "best":
        if not evaluates:
            name = "load_best_model_at_end" if flags.load_best_model_at_end else "save_strategy best"
            fail(f"--{name} needs rows to find the best on: add --eval_data_path data/test.json")
        flags.metric_for_best_model = flags.metric_for_best_model or "loss"
        if flags.save_strategy == "steps":
            flags.save_strategy = flags.eval_strategy  # each evaluation needs its checkpoint
            flags.save_steps = flags.eval_steps or flags.logging_steps
    if str(flags.resume_from_checkpoint).lower() == "false":
        flags.resume_from_checkpoint = None
    check_engine(engine_asked_for(flags), flags.use_cpu)
    ours = {"push_to_hub": flags.push_to_hub, "save_total_limit": flags.save_total_limit}
    flags.push_to_hub, flags.save_total_limit = False, None
    args = Arguments(*parser.to_dataclasses(flags), **ours)
    check_combinations(args, evaluates)
    if not engine_asked_for(args.training):  # FSDP and DeepSpeed could not shard a model of a few weights
        parser.to_dataclasses(flags, lambda groups: try_out(groups[-1], evaluates))
    if args.training.n_gpu > 1:
        # private, for want of a public way; or the Trainer would split each batch over all GPUs, in one slow process
        args.training._n_gpu = 1
        say("several GPUs but one process: only the first GPU is used; for all of them: torchrun --nproc_per_node gpu")
    fact("precision", describe_precision(args.training, has_bf16))
    say_how_many(args.training)
    return args


def describe_precision(training_args: TrainingArguments, has_bf16: bool) -> str:
    """Where the run trains, in which precision, and which would be better."""
    device = training_args.device.type
    if device == "cpu":
        why = "on the CPU, as --use_cpu says" if torch.accelerator.is_available() else "no GPU"
        return f"float32 ({why}; half precision is many times slower on a CPU)"
    if device != "cuda":
        return f"float32, on {'the GPU of this Mac' if device == 'mps' else device}"
    if training_args.fp16:
        return "float16" + ("; --bf16 True is safer for Qwen, and this GPU supports it" if has_bf16 else "")
    return "bfloat16" if training_args.bf16 else "float32"


def check_combinations(args: Arguments, evaluates: bool) -> None:
    """Refuse flags that exclude each other, or lack a package or a file."""
    training_args = args.training
    if not training_args.do_train:
        fail("--do_train False: nothing would be trained; leave it out, or ask an adapter with inference.py")
    check_trackers(training_args.report_to, training_args.hub_token)
    if not (args.run.dry_run or args.data.show_rows):
        reach_trackers(training_args.report_to)
    if args.run.dry_run and count_processes() > 1:
        fail("--dry_run True measures what one process needs: start it without torchrun or accelerate launch")
    if training_args.label_smoothing_factor:
        fail("--label_smoothing_factor needs the logits of all tokens, which are not computed here; leave it out")
    if training_args.torch_compile:
        fail("--torch_compile would compile for a minute or more at each new length of a batch; leave it out")
    checkpointing = training_args.gradient_checkpointing_kwargs or {}
    if checkpointing and not training_args.gradient_checkpointing:
        fail("--activation_checkpointing_kwargs says how to checkpoint: add --gradient_checkpointing True")
    if checkpointing.get("offload") and training_args.device.type != "cuda":
        fail("--activation_checkpointing_kwargs: offload moves activations from a GPU to main memory, and needs a GPU")
    if training_args.eval_strategy != "no" and not evaluates:
        fail("--eval_strategy needs rows to evaluate on: add --eval_data_path data/test.json")
    if training_args.remove_unused_columns:
        fail("--remove_unused_columns True would remove what batches are made of; leave it out")
    loading = training_args.accelerator_config
    if loading and (loading.dispatch_batches or loading.split_batches):
        fail("--accelerator_config: batches of rows end to end can be neither dispatched nor split; leave these out")
    metric = training_args.metric_for_best_model or ""
    if metric.endswith("loss") and training_args.greater_is_better:
        fail("--greater_is_better True would keep the worst loss; leave it out")
    if training_args.hub_strategy != "end":
        fail("--hub_strategy: the finished adapter is uploaded, no checkpoints; leave the flag out")
    if args.run.overwrite_output_dir and training_args.resume_from_checkpoint:
        fail("--overwrite_output_dir starts anew and --resume_from_checkpoint continues: leave one of them out")


def try_out(args: TrainingArguments, evaluates: bool) -> None:
    """Train a model of a few weights for two steps, and evaluate it: what the Trainer would refuse, it refuses now.

    Nothing is printed or kept.

    Args:
        args: those of the run, in an object of its own, which is changed.
        evaluates: whether there will be rows to evaluate on.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 64}  # 4,096 weights: smaller matrices have no 8-bit states
    layers = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=2, **sizes, **layers))
    args._n_gpu = min(args.n_gpu, 1)  # see parse_arguments
    rows = [{"input_ids": [0, 1], "labels": [0, 1]}] * (args.train_batch_size * args.world_size)
    if not gc.get_freeze_count():
        gc.freeze()  # the modules, which stay: or each Trainer would search them for garbage, for half a second
    args.report_to, args.disable_tqdm, args.max_steps = [], True, 2
    with TemporaryDirectory() as args.output_dir, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable()
        try:
            eval_rows = rows[: args.world_size] if evaluates else None
            trainer = Trainer(model, args, train_dataset=rows, eval_dataset=eval_rows)
            trainer.remove_callback(PrinterCallback)
            trainer.get_train_dataloader()  # with workers, which are not started
            args.dataloader_num_workers, args.dataloader_persistent_workers = 0, False
            args.dataloader_prefetch_factor = args.dataloader_multiprocessing_context = None
            args.save_strategy, args.eval_delay = "no", 0
            args.eval_strategy = "no" if args.eval_strategy == "no" else "epoch"
            trainer.train()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):  # of a GPU that others fill: loading the model says what to do
                raise
        finally:
            logging.disable(logging.NOTSET)


def check_batches(rows: int, args: TrainingArguments) -> None:
    """Refuse to leave out the last batch of an epoch if it is the only one."""
    if args.dataloader_drop_last and rows < (batch := args.train_batch_size * args.world_size):
        fail(f"--dataloader_drop_last True: {rows} rows are less than a batch of {batch}: none would be learnt")


def check_trackers(names: list[str], hub_token: str | None) -> None:
    """Refuse a tracker that does not exist or lacks its package, and a token in a command line that is recorded."""
    for name in names:
        try:
            get_reporting_integration_callbacks([name])
        except ValueError as error:
            fail(f"--report_to {error}")
        module, package = PACKAGES.get(name, (name, name))
        if name != "kubeflow" and not find_spec(module):  # kubeflow needs none, and is used if its server is there
            fail(f"--report_to {name} needs the package {package}: pip install {package}, or leave the flag out")
    if names and hub_token:
        fail("--hub_token would be recorded with the command line: set the variable HF_TOKEN, or log in: hf auth login")


def reach_trackers(names: list[str]) -> None:
    """Log in, or open the store. The callbacks would do it after the model is loaded, and fail with a traceback."""
    for name in names:
        if name not in REMEDIES or os.environ.get(f"{name.upper()}_MODE") in OFFLINE_MODES or not is_main_process():
            continue
        module = import_module(name)
        try:
            module.search_experiments(max_results=1) if name == "mlflow" else module.login()
        except Exception as error:  # each tracker has its own
            fail(f"--report_to {name}: {first_line(error)}\n{REMEDIES[name]}")


def start_swanlab(args: TrainingArguments) -> None:
    """Start SwanLab's run. transformers 5.23 asks first whether there is one, which is an error from SwanLab 0.8 on."""
    if "swanlab" not in args.report_to or not is_main_process():
        return
    names = {"project": "SWANLAB_PROJECT", "id": "SWANLAB_RUN_ID", "resume": "SWANLAB_RESUME"}
    options = {name: os.environ.get(variable) for name, variable in names.items()}
    options["resume"] = options["resume"] or ("allow" if args.resume_from_checkpoint else None)
    import_module("swanlab").init(experiment_name=args.run_name, **options)


def memory_flags(args: Arguments, longest: int | None = None) -> dict[str, str]:
    """The flags that save memory and are not used yet, by what they do, in the order to try them.

    They cut rows to half the `longest` of the data, in tokens, if that is known.
    """
    training, checkpointing = args.training, args.training.gradient_checkpointing
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    fewer = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {batch * accumulation}"
    one_row = [fewer] if batch > 1 else []
    if (args.data.eval_data_path or args.data.eval_split) and training.per_device_eval_batch_size > 1:
        one_row.append("--per_device_eval_batch_size 1")
    offloads = (training.gradient_checkpointing_kwargs or {}).get("offload")
    can_offload = checkpointing and training.device.type == "cuda" and not offloads
    flags = {
        "checkpointing": "" if checkpointing else "--gradient_checkpointing True",
        "offload": OFFLOAD if can_offload else "",
        "4 bits": "" if args.model.load_in_4bit else "--load_in_4bit True",
        "one row": " ".join(one_row),
        "no dropout": "" if checkpointing or not vars(args.method).get("lora_dropout") else "--lora_dropout 0",
        "half length": f"--max_length {min(args.data.max_length, longest or args.data.max_length) // 2}",
    }
    return {name: flag for name, flag in flags.items() if flag}
