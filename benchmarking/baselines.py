"""The trainers that ours is compared with: the stock Trainer on padded batches, and TRL's."""

from datasets import Dataset
from peft import LoraConfig, PeftModel, PeftModelForCausalLM
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from finetuning.model.soft_prompts import SoftPromptModel


def make_stock_trainer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, training_args: TrainingArguments, dataset: Dataset
) -> Trainer:
    """The stock Trainer with PEFT's own model and padded batches; a soft prompt keeps its first values."""
    if isinstance(model, SoftPromptModel):
        prompt = model.prompt_encoder.state_dict()
        model = PeftModelForCausalLM(model.get_base_model(), model.active_peft_config)
        model.prompt_encoder.load_state_dict(prompt)
    return Trainer(model, training_args, train_dataset=dataset, data_collator=DataCollatorForSeq2Seq(tokenizer))


def make_trl_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: LoraConfig,
    training_args: TrainingArguments,
    dataset: Dataset,
) -> Trainer:
    """TRL's trainer at its defaults, but with our learning rate, precision and rows, and without checkpointing."""
    from trl import SFTConfig, SFTTrainer  # not a requirement

    names = "output_dir learning_rate gradient_checkpointing per_device_train_batch_size max_steps save_strategy "
    names += "logging_steps bf16 fp16 seed dataloader_pin_memory use_cpu logging_nan_inf_filter"
    config = SFTConfig(**{name: getattr(training_args, name) for name in names.split()}, report_to="none")
    return SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer, peft_config=adapter)
