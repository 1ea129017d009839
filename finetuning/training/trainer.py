"""The Trainer of this project: the stock one with our batches, attention, loss and checkpoints."""

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from finetuning.cli.console import fact, fail, say
from finetuning.distributed import adjust_fsdp, fill_up, share_rows_once
from finetuning.model.soft_prompts import SoftPromptModel
from finetuning.training.attention import KERNELS, attention, choose_attention, missing_packages
from finetuning.training.callbacks import NotFiniteGuard
from finetuning.training.checkpoints import explain_failed_write
from finetuning.training.collators import FlattenCollator, PadCollator, can_flatten, is_known, layer_types
from finetuning.training.flags import start_swanlab
from finetuning.training.losses import put_loss_head


class FineTuningTrainer(Trainer):
    """The stock Trainer with six additions, all in public methods.

    The loss is computed in chunks from the hidden states; attention needs no mask; a loss that is not finite is
    reported with the rows it came from; several processes get each row once; the loss of an evaluation is the mean of
    its tokens; a run that is resumed at its end takes no step.

    Args:
        kernel: of attention, from `choose_attention`.
    """

    def __init__(self, model: PeftModel | PreTrainedModel, args: TrainingArguments, kernel: str, **kwargs: Any) -> None:
        self.kernel = kernel
        self.base_model = model.get_base_model() if isinstance(model, PeftModel) else model
        self.loss_head = put_loss_head(self.base_model)
        super().__init__(model, args, **kwargs)
        if self.is_fsdp_enabled:
            adjust_fsdp(self.accelerator.state.fsdp_plugin, self.base_model.get_decoder().layers)
        self.not_finite_guard = NotFiniteGuard(self.accelerator.scaler)
        self.add_callback(self.not_finite_guard)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        row_numbers = inputs.pop("row_numbers", [])
        if self.loss_head is None:  # full fine-tuning, for one
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            loss, outputs = self.loss_head.loss(model, inputs, num_items_in_batch), {}
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # whose gradients DDP averages
        if model.training:
            self.not_finite_guard.record(row_numbers, loss.detach())
        else:
            self.evaluated += torch.stack([loss.detach() * num_items_in_batch, num_items_in_batch])
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The stock loop, with the mean loss of all supervised tokens, and not of the batches' means."""
        self.evaluated = torch.zeros(2, device=self.args.device)  # the tokens' losses, summed up, and their number
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, count = self.accelerator.reduce(self.evaluated, "mean").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / count
        return output

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        """No batches for a run that is resumed at its end: the stock loop counts its steps only after the first."""
        if 0 < self.state.max_steps <= self.state.global_step:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        return share_rows_once(super().get_train_dataloader())

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        autocast = self.args.fp16 or self.args.bf16
        # PEFT casts the input of each LoRA layer to the adapter's float32, and autocast casts it back
        plain_inputs = disable_input_dtype_casting(self.base_model, active=autocast)
        start_swanlab(self.args)
        try:
            with attention(self.base_model, self.kernel), plain_inputs:
                return super().train(*args, **kwargs)
        except Exception as error:
            explain_failed_write(error, self.args.output_dir, self.state.global_step)
            raise


def prepare_adapter(model: PeftModel) -> None:
    """Make the trainable parameters float32, and print how many there are; let gradients through 4-bit weights."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # "Attempting to unscale FP16 gradients" otherwise
    for module in model.modules():
        if isinstance(module, Linear4bit):  # on CPUs with AVX512-BF16 an evaluation would repack its weights for good,
            module.support_avx512bf16_for_cpu = False  # for a kernel that has no gradient
    trainable, total = model.get_nb_trainable_parameters()
    if trainable == 0:
        fail("the adapter has no trainable parameters")
    fact("model", f"{model.config.model_type}, {total - trainable:,} parameters")
    fact("trainable", f"{trainable:,} of {total:,} parameters ({100 * trainable / total:.4f}%)")


def make_trainer(
    model: PeftModel | PreTrainedModel,
    pad_token_id: int,
    args: TrainingArguments,
    train_dataset: Dataset,
    eval_dataset: Dataset | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    optimizer: torch.optim.Optimizer | None = None,
) -> FineTuningTrainer:
    """Build the Trainer, with batches without padding if the model allows them.

    Args:
        args: the Trainer's; rows in random order are grouped by length, and `args` say so, if they have to be padded.
        train_dataset, eval_dataset: the columns of `common.preprocess_function`.
        optimizer: None for that of `args`.
    """
    virtual_tokens = len(model.virtual_tokens) if isinstance(model, SoftPromptModel) else 0
    if can_flatten(model.config) and args.neftune_noise_alpha is None:  # NEFTune's noise depends on a row's length
        collator = FlattenCollator(virtual_tokens)
    else:
        collator = PadCollator(pad_token_id, virtual_tokens)
        if args.train_sampling_strategy == "random":
            args.train_sampling_strategy = "group_by_length"
    if eval_dataset is not None and args.world_size > 1:
        eval_dataset = fill_up(eval_dataset, args.eval_batch_size * args.world_size)
    capability = torch.cuda.get_device_capability(args.device) if args.device.type == "cuda" else None
    flattened = isinstance(collator, FlattenCollator)
    kernel = choose_attention(model.config, flattened, capability, args.fp16 or args.bf16)
    fact("batches", f"{'rows end to end' if flattened else 'padded rows'}; attention: {KERNELS[kernel]}")
    if not is_known(model.config):
        kinds = ", ".join(sorted(layer_types(model.config)))
        say(f"{model.config.model_type} was not tried here: rows are padded, and {kinds} is transformers' own")
    missing = missing_packages(model.config)
    if capability and missing:
        say(f"linear attention takes its slow path; for the fast kernels: pip install {' '.join(missing)}")
    trainer = FineTuningTrainer(
        model,
        args,
        kernel,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)  # see progress.py
    return trainer
