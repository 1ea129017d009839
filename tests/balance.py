"""Count how many more tokens the slowest GPU of a step has than the mean, with and without `batch_rebalance`.

    PYTHONPATH=. python tests/balance.py

Rows of lengths as in Alpaca (log-normal, mean 152 tokens), and those of data/train.json; 8 GPUs with 8 rows each.
"""

import numpy as np
from support import REPOSITORY, preprocess
from transformers import AutoTokenizer
from transformers.trainer_pt_utils import BatchRebalanceSampler

from finetuning.training.collators import row_lengths

GPUS, ROWS = 8, 8
SPREAD = 0.57  # of the logarithms: that of 1,000 rows of the Chinese Alpaca


def excess(lengths: np.ndarray, turns: list[list[list[int]]]) -> float:
    """The mean over the steps of the largest share of the tokens, 1 if they are equal.

    Args:
        turns: for each GPU its batches, as numbers of rows.
    """
    tokens = np.array([[lengths[batch].sum() for batch in batches] for batches in turns])
    return float((tokens.max(axis=0) / tokens.mean(axis=0)).mean())


def main() -> None:
    generator = np.random.default_rng(0)
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "models/tiny-qwen")
    alpaca = generator.lognormal(np.log(152) - SPREAD**2 / 2, SPREAD, 20_000).astype(int) + 1
    train = np.array(row_lengths(preprocess(str(REPOSITORY / "data/train.json"), tokenizer, 1024).dataset))
    for name, lengths in {"as in Alpaca": alpaca, "data/train.json": train}.items():
        steps = len(lengths) // (GPUS * ROWS)
        order = generator.permutation(len(lengths))[: steps * GPUS * ROWS].reshape(steps, GPUS, ROWS)
        random = [list(order[:, gpu]) for gpu in range(GPUS)]
        balanced = [
            list(BatchRebalanceSampler(lengths.tolist(), GPUS * ROWS, dp_size=GPUS, grad_accum=1, rank=gpu))
            for gpu in range(GPUS)
        ]
        print(f"{name}: random {excess(lengths, random):.2f}, batch_rebalance {excess(lengths, balanced):.2f}")


if __name__ == "__main__":
    main()
