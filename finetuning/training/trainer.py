"""The Trainer of this project: the stock one with our batches, attention, loss and checkpoints."""

import copy
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput

from finetuning.adapter.soft_prompts import SoftPromptModel
from finetuning.training.attention import row_attention
from finetuning.training.callbacks import NotFiniteGuard
from finetuning.training.checkpoints import CheckpointWriter, explain_failed_write
from finetuning.training.collators import FlattenCollator, PadCollator, can_flatten
from finetuning.training.losses import ChunkedLoss


class FineTuningTrainer(Trainer):
    """The stock Trainer with three additions, all in public methods.

    The loss is computed in chunks from the hidden states; attention on flattened batches goes row by row; a loss that
    is not finite is reported with the rows it came from.
    """

    def __init__(self, model: PeftModel | PreTrainedModel, args: TrainingArguments, **kwargs: Any) -> None:
        self.base_model = model.get_base_model() if isinstance(model, PeftModel) else model
        head = self.base_model.get_output_embeddings()
        # in full fine-tuning lm_head is trained too, and the stock loss is used
        self.chunked_loss = None if head.weight.requires_grad else ChunkedLoss(head)
        super().__init__(model, args, compute_loss_func=self.chunked_loss, **kwargs)
        self.not_finite_guard = NotFiniteGuard()
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
        with self.chunked_loss.without_logits() if self.chunked_loss else nullcontext():
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self.not_finite_guard.record(row_numbers, loss.detach())
        return (loss, outputs) if return_outputs else loss

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        flattened = isinstance(self.data_collator, FlattenCollator)
        try:
            with row_attention(self.base_model) if flattened else nullcontext():
                return super().train(*args, **kwargs)
        except Exception as error:
            explain_failed_write(error, self.args.output_dir, self.state.global_step)
            raise


def make_trainer(
    model: PeftModel | PreTrainedModel,
    pad_token_id: int,
    training_args: TrainingArguments,
    train_dataset: Dataset,
    eval_dataset: Dataset | None = None,
    adapter_files: dict[str, str] | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> FineTuningTrainer:
    """Build the Trainer, with batches without padding if the model allows them.

    Args:
        train_dataset, eval_dataset: the columns of `common.preprocess_function`.
        adapter_files: texts to save in each checkpoint, from `describe_adapter`; None if no checkpoint is saved.
    """
    args = copy.copy(training_args)
    args.push_to_hub = False  # see hub.py
    virtual_tokens = len(model.virtual_tokens) if isinstance(model, SoftPromptModel) else 0
    if can_flatten(model.config) and args.neftune_noise_alpha is None:  # NEFTune's noise depends on a row's length
        collator = FlattenCollator(virtual_tokens)
    else:
        collator = PadCollator(pad_token_id, virtual_tokens)
        if args.train_sampling_strategy == "random":
            args.train_sampling_strategy = "group_by_length"
    if adapter_files:
        callbacks += (CheckpointWriter(adapter_files, args.save_total_limit),)
        args.save_total_limit = None  # or the Trainer would remove an old checkpoint before the new one is whole
    return FineTuningTrainer(
        model,
        args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        callbacks=list(callbacks),
    )
