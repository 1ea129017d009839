"""The rows of a run: those to train on, and those to evaluate on."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from finetuning.preprocessing.flags import DataArguments
from finetuning.preprocessing.rows import Rows, load_rows
from finetuning.preprocessing.summary import Summary, print_summary
from finetuning.preprocessing.thoughts import use_of_thoughts, without_thoughts
from finetuning.preprocessing.token_cache import TokenCache
from finetuning.preprocessing.token_dataset import ChunkTokenizer, make_dataset, split_rows


@dataclass
class Data:
    """Rows to train or evaluate on: their tokens, what is known of them, and what answers are compared with."""

    dataset: Dataset
    summary: Summary
    rows: Rows | None = None  # with their texts; None if they are not to be answered


def read_data(path: str, tokenize_chunk: ChunkTokenizer, **options: Any) -> Data:
    """Read, check and tokenise data files, and print how many rows were kept, cut and dropped.

    Args:
        options: those of `make_dataset`.
    """
    dataset, summary = make_dataset(path, tokenize_chunk, **options)
    learnt_as = use_of_thoughts(tokenize_chunk.tokenizer, tokenize_chunk.thinking)
    print_summary(summary, tokenize_chunk.max_length, learnt_as)
    return Data(dataset, summary)


def read_training_data(
    args: DataArguments, tokenize_chunk: ChunkTokenizer, seed: int, fills_cache: bool, scores: bool
) -> tuple[Data, Data | None]:
    """The rows to train on, and those to evaluate on: of a file of their own, or a share of the others.

    Args:
        seed: of the draw of this share.
        fills_cache: whether this process writes the token cache; on each machine one does.
        scores: whether this process answers the evaluation rows, and so needs their texts.
    """
    cache = TokenCache(args.token_cache_dir, args.token_cache_gb, fills_cache)
    options = {"num_workers": args.preprocessing_num_workers, "cache": cache}
    train = read_data(args.data_path, tokenize_chunk, max_rows=args.max_rows, **options)
    if args.eval_split:
        train.dataset, held_out = split_rows(train.dataset, args.eval_split, seed)
        evaluation, path, numbers = Data(held_out, train.summary), args.data_path, set(held_out["row_number"])
    elif args.eval_data_path:
        path, numbers = args.eval_data_path, None
        evaluation = read_data(path, tokenize_chunk, **options)
    else:
        return train, None
    if args.eval_metrics and scores:
        evaluation.rows = load_rows(path, rename=tokenize_chunk.rename, numbers=numbers)
        if args.thinking == "off":
            evaluation.rows[:] = map(without_thoughts, evaluation.rows)
    return train, evaluation
