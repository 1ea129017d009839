"""Fine-tune Qwen with prompt tuning: only a few vectors in front of each prompt are trained.

    python train_prompt_tuning.py --model_path path/to/qwen --data_path data/train.json --num_virtual_tokens 20 \\
        --prompt_init_text "分类任务："

Without arguments it trains models/tiny-qwen on data/train.json, in about a minute on a laptop.
"""

from dataclasses import dataclass

from finetuning.cli.console import fact, fail  # before peft, whose import is noisy

# isort: split
import torch
from peft import PromptTuningConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import load_data, load_model, load_tokenizer, start_run, train
from finetuning.cli.arguments import flag
from finetuning.cli.memory import memory_advice
from finetuning.distributed import shards_weights, whole
from finetuning.model.soft_prompts import SoftPromptModel
from finetuning.preprocessing.show import print_rows
from finetuning.training.flags import memory_flags, parse_arguments


@dataclass
class PromptTuningArguments:
    _argument_group_name = "prompt tuning"

    num_virtual_tokens: int | None = flag(
        None, "trained vectors in front of each prompt; left out: as many as the text has tokens"
    )
    prompt_tuning_init: str = flag(
        "TEXT",
        "start from the embeddings of --prompt_init_text (TEXT), of random tokens (SAMPLE_VOCAB), or from "
        "random numbers of the embeddings' mean and spread (RANDOM)",
        choices=["TEXT", "SAMPLE_VOCAB", "RANDOM"],
    )
    prompt_init_text: str = flag(
        "分类任务：", "TEXT: the text to start from; cut or repeated to --num_virtual_tokens, with a message"
    )

    def __post_init__(self) -> None:
        if self.num_virtual_tokens is not None and self.num_virtual_tokens < 1:
            raise ValueError(f"--num_virtual_tokens {self.num_virtual_tokens}: nothing would be trained; 20 is usual")
        if self.num_virtual_tokens is None and self.prompt_tuning_init != "TEXT":
            raise ValueError("--num_virtual_tokens is needed if no text gives the number; 20 is usual")
        if self.prompt_tuning_init == "TEXT" and not self.prompt_init_text:
            raise ValueError('--prompt_init_text is empty: describe the task in a few words, such as "分类任务："')


def add_soft_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_args: PromptTuningArguments
) -> SoftPromptModel:
    """Give the model a soft prompt, and print what the prompt starts from.

    The first values are made here and not by PEFT, which cuts and repeats the text without a message, draws random
    numbers 50 times too large for Qwen, and saves the path of this machine's tokenizer in the adapter.

    Raises:
        SystemExit: code 2, if the prompt leaves the rows no room.
    """
    embeddings = whole(model.get_input_embeddings().weight)
    text_ids = tokenizer(prompt_args.prompt_init_text, add_special_tokens=False).input_ids
    count = prompt_args.num_virtual_tokens or len(text_ids)
    positions = model.config.get_text_config().max_position_embeddings
    if count >= positions:
        fail(f"--num_virtual_tokens {count}: the model has {positions} positions, which leaves none for the rows")
    if prompt_args.prompt_tuning_init == "TEXT":
        start = embeddings[torch.tensor((text_ids * count)[:count], device=embeddings.device)]
        use = "used once" if count == len(text_ids) else "cut" if count < len(text_ids) else "repeated"
        words = tokenizer.decode((text_ids * count)[:count])
        fact("method", f"soft prompt of {count} tokens; the text has {len(text_ids)} and is {use}: {words!r}")
    elif prompt_args.prompt_tuning_init == "SAMPLE_VOCAB":
        start = embeddings[torch.randint(len(tokenizer), (count,), device=embeddings.device)]
        fact("method", f"soft prompt of {count} tokens, from the embeddings of random tokens")
    else:
        deviation, mean = torch.std_mean(embeddings[: len(tokenizer)].float(), dim=0)
        start = mean + deviation * torch.randn(count, len(mean), device=embeddings.device)
        fact("method", f"soft prompt of {count} tokens, from random numbers with the mean and spread of the embeddings")
    model = SoftPromptModel(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=count))
    model.prompt.data.copy_(start)
    return model


def main() -> None:
    args = parse_arguments(PromptTuningArguments, __doc__, output_dir="outputs/prompt_tuning", learning_rate=3e-2)
    start_run(args)
    tokenizer = load_tokenizer(args.model, args.data.prompt_format)
    train_data, eval_data = load_data(args, tokenizer)
    if args.data.show_rows:
        return print_rows(train_data.dataset, args.data.show_rows, tokenizer)
    model = load_model(args.model, args.dtype, args.training.device, shards_weights(args.training))
    with memory_advice(args.training.device, memory_flags(args).values()):
        model = add_soft_prompt(model, tokenizer, args.method)
        train(model, tokenizer, train_data, eval_data, args)


if __name__ == "__main__":
    main()
