"""Make models/tiny-qwen again: a tokenizer and a Qwen2 of two million parameters, from a seed, on a CPU.

    python models/make_tiny_qwen.py

The model is pretrained on plain lines of text that hold what the sample data in data/ asks for (the words, the
translations, the sentiments, the topics), but not the way it asks: no instruction of data/, no question in its prompt
format, and no sentence that data/ holds out for its test. Following instructions is left to fine-tuning.
"""

import json
import math
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))
import make_data  # noqa: E402  (the line above makes it importable)

OUTPUT_DIR = ROOT / "models" / "tiny-qwen"
SEED = 0
MAX_LENGTH = 1024  # positions of the model; the tokenizer's model_max_length
SEQUENCE_LENGTH, BATCH_SIZE, STEPS, EVAL_STEPS = 96, 16, 2400, 200
MUON_LR, ADAMW_LR, WARMUP_STEPS = 5e-3, 3e-3, 50
QUESTION_SHARE = 0.1  # of the tokens left of a mark count in the loss, and all of the answer, which is to be learnt

# A line of the pretraining text reads `- question mark answer`.
MARKS = {"translation": "=>", "sentiment": "~", "topic": "#", "rewrite": "/", "complete": "+", "use_word": "@"}
# Or it is three lines, `Key: heading`, `Key: question`, `Key: answer`, with one of these words as the heading.
HEADINGS = {
    "translation": ["翻译", "Translate"],
    "sentiment": ["情感", "评论", "sentiment", "review"],
    "topic": ["主题", "新闻", "topic", "news"],
    "rewrite": ["改写", "礼貌", "客气", "Rewrite", "polite"],
    "complete": ["续写", "补充", "接着", "Complete", "Finish"],
    "use_word": ["造句", "写", "Write", "Use"],
}
# How many in a hundred lines are of each kind.
SHARES = {
    "translation": 46,
    "word": 10,
    "sentiment": 7,
    "topic": 7,
    "rewrite": 9,
    "complete": 4,
    "use_word": 6,
    "list": 5,
    "record": 6,
}
# Records, `Key: words`, mean nothing. They are there so that these words have trained embeddings, which stay as they
# are in fine-tuning: the keys of a prompt, and the words of the instructions, of which the Chinese are written apart.
RECORD_KEYS = "Instruction Input Output Name Date Place Subject Text Note Title".split()
ANSWER_KEYS = RECORD_KEYS[3:]
CHINESE_INSTRUCTION_WORDS = (
    "翻译 为 成 英文 中文 请 把 下面 的 句子 这 句话 判断 情感 正面 负面 中性 还是 条 评论 是 什么 对 做 分类 新闻 "
    "主题 属于 哪个 改写 得 更 礼貌 客气 说 用 语气 补充 完整 续写 接着 写 完 一个 造句 任务"
).split()
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

PUNCTUATION = ["。", "，", "？", "……", " “", "”", ' "', " ...", *(f" {mark}" for mark in MARKS.values())]
CHINESE, ENGLISH = "[\u4e00-\u9fff]+", "[A-Za-z]+"


def strings(value: object) -> Iterator[str]:
    """Every string in a nest of tables."""
    if isinstance(value, str):
        yield value
    else:
        for part in value.items() if isinstance(value, dict) else value:
            yield from strings(part)


TEMPLATES = [
    make_data.SENTENCES,
    make_data.NEWS,
    make_data.REVIEWED,
    make_data.VERDICTS,
    make_data.COMMANDS,
    make_data.POLITE,
    make_data.BEGINNINGS,
    make_data.USES,
    make_data.PHRASES,
    make_data.SENTIMENTS,
]
ENGLISH_INSTRUCTION_WORDS = sorted(
    {word for wordings in make_data.INSTRUCTIONS.values() for text in wordings[1] for word in re.findall(ENGLISH, text)}
)
INSTRUCTION_WORDS = CHINESE_INSTRUCTION_WORDS + ENGLISH_INSTRUCTION_WORDS
WORD_PAIRS = make_data.PHRASES * 3 + [
    pair for name, pairs in make_data.WORDS.items() if name not in ("object", "forecast", "storm") for pair in pairs
]
USED_WORDS = [make_data.WORDS[word_class] for word_class in make_data.USES]


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer


def vocabulary() -> list[str]:
    """The words that are to be one token each, English ones with the space before them, and stretches of Chinese.

    Byte-pair encoding merges frequent pairs first: words are repeated, so that they win over the stretches.
    """
    words, stretches = {*CHINESE_INSTRUCTION_WORDS, *RECORD_KEYS, *PUNCTUATION}, set()
    for text in strings(make_data.WORDS):
        words.update(re.findall(CHINESE, text))
    for text in strings([make_data.WORDS, TEMPLATES, RECORD_KEYS, ENGLISH_INSTRUCTION_WORDS]):
        text = re.sub("{.*?}", "|", text)
        stretches.update(stretch for stretch in re.findall(CHINESE, text) if len(stretch) <= 6)
        words.update(f" {word}" for word in re.findall(ENGLISH, text))
    for text in strings([make_data.WORDS[word_class] for word_class in ("subject", "group", "season")] + TEMPLATES):
        words.update(f" {word.capitalize()}" for word in re.findall("^" + ENGLISH, text))
    for text in strings([make_data.WORDS[word_class] for word_class in make_data.USES]):
        words.update(re.findall("^" + ENGLISH, text))
    return sorted(words) * 20 + sorted(stretches)


def make_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with Qwen's pre-tokenisation and special tokens, trained on the vocabulary."""
    tokenizer = Qwen2Tokenizer(model_max_length=MAX_LENGTH).train_new_from_iterator(
        vocabulary(),
        vocab_size=10_000,
        new_special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# Text


def quoted(text: str) -> str:
    """The text in the quotation marks of its language."""
    return f'"{text}"' if text.isascii() else f"“{text}”"


def sample_line(rng: random.Random, kind: str, held_out: bool = False) -> tuple[str, str]:
    """One line of text as its question, mark included, and its answer."""
    if kind == "record":
        return f"{rng.choice(RECORD_KEYS)}: {' '.join(rng.sample(INSTRUCTION_WORDS, rng.randint(2, 5)))}", ""
    if kind == "list":
        language = rng.randrange(2)
        question, *others = (pair[language] for pair in rng.sample(rng.choice(USED_WORDS), 3))
        return f"- {quoted(question)} &", " " + " ".join(others)
    if kind == "word":
        kind = "translation"
        question, answer = rng.choice(WORD_PAIRS)[:: rng.choice((1, -1))]
        if rng.random() < 0.3:
            question = quoted(question)
    else:
        while make_data.is_held_out(item := make_data.SAMPLERS[kind](rng)) != held_out:
            pass
        question, answer = rng.choice(item)
    if kind == "use_word":
        question = quoted(question)
    if rng.random() < 0.5:
        return f"- {question} {MARKS[kind]}", f" {answer}"
    keys = rng.sample(ANSWER_KEYS, 3)
    return f"{keys[0]}: {rng.choice(HEADINGS[kind])}\n{keys[1]}: {question}\n{keys[2]}:", f" {answer}"


def sample_lines(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """`count` lines of all kinds, each a text of its own that ends with <|endoftext|>."""
    lines = (sample_line(rng, kind) for kind in rng.choices(list(SHARES), list(SHARES.values()), k=count))
    return [(question, answer + "<|endoftext|>") for question, answer in lines]


def check_held_out(lines: list[tuple[str, str]]) -> None:
    """Assert that the text holds no sentence that data/test.json asks about or expects; labels are no sentences."""
    text = "".join(question + answer for question, answer in lines)
    for row in json.loads((ROOT / "data" / "test.json").read_text(encoding="utf-8")):
        sentences = [row["input"]] if row["task"] in ("sentiment", "topic") else [row["input"], row["output"]]
        leaked = [sentence for sentence in sentences if sentence and sentence in text]
        assert not leaked, f"held out, yet in the pretraining text: {leaked}"


def encode(tokenizer: PreTrainedTokenizerBase, lines: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """The token ids of questions and answers."""
    questions, answers = (
        tokenizer(list(part), add_special_tokens=False)["input_ids"] for part in zip(*lines, strict=True)
    )
    return list(zip(questions, answers, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Model


def make_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """An untrained Qwen2, small in every dimension."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


@torch.no_grad()
def exact_match(model: Qwen2ForCausalLM, rows: list[tuple[list[int], list[int]]]) -> float:
    """Share of answers of which every token is the most probable one, given the question and the tokens before."""
    hits = 0
    for question, answer in rows:
        logits = model(torch.tensor([question + answer]), logits_to_keep=len(answer) + 1).logits[0, :-1]
        hits += logits.argmax(-1).tolist() == answer
    return hits / len(rows)


def train(
    model: Qwen2ForCausalLM, batches: TensorDataset, held_out: dict[str, list[tuple[list[int], list[int]]]]
) -> None:
    """Train for one pass over the batches of ids and of which of them count; Muon for matrices, AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [
        LambdaLR(optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1 - step / STEPS)) for optimizer in optimizers
    ]
    start, total = time.time(), 0.0
    for step, (ids, counted) in enumerate(batches, start=1):
        hidden = model.model(ids).last_hidden_state[:, :-1]
        kept = counted[:, 1:]
        loss = cross_entropy(model.lm_head(hidden[kept]), ids[:, 1:][kept])
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        total += loss.item()
        if step % EVAL_STEPS == 0:
            accuracy = ", ".join(f"{kind} {exact_match(model, rows):.2f}" for kind, rows in held_out.items())
            seconds = time.time() - start
            print(f"step {step}, loss {total / EVAL_STEPS:.3f}, {seconds:.0f} s, held out: {accuracy}", flush=True)
            total = 0.0


def main() -> None:
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)

    lines = sample_lines(rng, STEPS * BATCH_SIZE * SEQUENCE_LENGTH // 15)  # a line has more than 15 tokens on average
    check_held_out(lines)
    ids, counted = [], []
    for question, answer in encode(tokenizer, lines):
        ids += question + answer
        counted += [rng.random() < QUESTION_SHARE for _ in question] + [True] * len(answer)
    shape = (STEPS, BATCH_SIZE, SEQUENCE_LENGTH)
    batches = TensorDataset(*(torch.tensor(column[: math.prod(shape)]).view(shape) for column in (ids, counted)))
    print(f"{len(tokenizer)} tokens in the vocabulary, {model.num_parameters():,} parameters, {shape} tokens of text")

    held_out = {kind: encode(tokenizer, [sample_line(rng, kind, held_out=True) for _ in range(100)]) for kind in MARKS}
    train(model, batches, held_out)

    model.half().save_pretrained(OUTPUT_DIR)
    tokenizer.save_pretrained(OUTPUT_DIR)
    end = tokenizer.eos_token_id
    GenerationConfig(do_sample=False, bos_token_id=end, eos_token_id=end, pad_token_id=end).save_pretrained(OUTPUT_DIR)


if __name__ == "__main__":
    main()
