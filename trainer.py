"""The stock Trainer with this project's batches, attention, loss and checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from attention import row_attention
from checkpoints import CheckpointTrainer
from collators import FlattenCollator, PadCollator, can_flatten
from guards import NotFiniteGuard
from losses import chunked_loss
from soft_prompts import SoftPromptModel


def make_trainer(
    model: PeftModel | PreTrainedModel,
    pad_token_id: int,
    training_args: TrainingArguments,
    train_dataset: Dataset,
    eval_dataset: Dataset | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> CheckpointTrainer:
    """Build the Trainer: batches without padding where the model allows it, and a stop at numbers that are not finite.

    Args:
        train_dataset, eval_dataset: the columns of `common.preprocess_function`.
    """
    virtual_tokens = len(model.virtual_tokens) if isinstance(model, SoftPromptModel) else 0
    if can_flatten(model.config) and training_args.neftune_noise_alpha is None:  # its noise depends on the length
        collator = FlattenCollator(virtual_tokens)
    else:
        collator = PadCollator(pad_token_id, virtual_tokens)
        if training_args.train_sampling_strategy == "random":
            training_args.train_sampling_strategy = "group_by_length"
    return CheckpointTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        callbacks=[*callbacks, NotFiniteGuard()],
    )


@contextmanager
def fast_steps(trainer: Trainer) -> Iterator[None]:
    """Within, the trainer's model computes its loss in chunks and, on flattened batches, attends row by row."""
    model = trainer.model
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    head_is_trained = base.get_output_embeddings().weight.requires_grad  # in full fine-tuning: benchmark.py
    with (
        nullcontext() if head_is_trained else chunked_loss(base),
        row_attention(base, enabled=isinstance(trainer.data_collator, FlattenCollator)),
    ):
        yield
