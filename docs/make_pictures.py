"""Draw the pictures of the READMEs: docs/pictures/*.svg, in English and Chinese.

    python docs/make_pictures.py

Every colour has enough contrast on white and on black, so that one file does for both themes.
"""

from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent / "pictures"
WIDTH = 830  # of a README's text on GitHub, in pixels
FONT = "system-ui, -apple-system, 'Segoe UI', 'PingFang SC', 'Microsoft YaHei', 'Noto Sans CJK SC', sans-serif"
GREY, BLUE, GREEN, PURPLE, ORANGE = "#6e7681", "#2a6cb0", "#2b7d4f", "#7b57b5", "#b8531c"
# Two rows of data for each picture, as (prompt tokens, answer tokens).
BATCH = ((5, 3), (3, 2), (7, 4))
SOFT_BATCH = ((4, 3), (3, 2))
VIRTUAL_TOKENS = 3


def text(
    x: float, y: float, words: str, size: int = 13, colour: str = GREY, anchor: str = "start", bold: bool = False
) -> str:
    look = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}"' + (' font-weight="600"' if bold else "")
    return f'<text x="{x:g}" y="{y:g}" {look}>{escape(words)}</text>'


def rectangle(x: float, y: float, width: float, height: float, colour: str, opacity: float = 1, radius: int = 3) -> str:
    """A rectangle; without a colour, a position with padding."""
    look = f'fill="{colour}" fill-opacity="{opacity:g}" stroke="{colour}"'
    look = look if colour else f'fill="none" stroke="{GREY}" stroke-dasharray="3 2"'
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" {look}/>'


def box(x: float, y: float, width: float, height: float, title: str, words: str, colour: str) -> str:
    middle, centre = x + width / 2, y + height / 2
    return (
        rectangle(x, y, width, height, colour, radius=8)
        + text(middle, centre - 3, title, 14, "#fff", "middle", bold=True)
        + text(middle, centre + 15, words, 11, "#fff", "middle")
    )


def arrow(*points: tuple[float, float], colour: str = GREY) -> str:
    """A line through the points with a head at its end, which is drawn to the right or downwards."""
    (x, y), (before, _) = points[-1], points[-2]
    head = f"{x - 7},{y - 4} {x},{y} {x - 7},{y + 4}" if x > before else f"{x - 4},{y - 7} {x},{y} {x + 4},{y - 7}"
    line = " ".join(f"{x:g},{y:g}" for x, y in points)
    return (
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        f'<polygon points="{head}" fill="{colour}"/>'
    )


def cells(x: float, y: float, size: float, prompt: int, answer: int, colour: str) -> list[str]:
    """A row of data: its prompt light, its answer dark."""
    places = [(x + size * number + 1.5, number) for number in range(prompt + answer)]
    return [rectangle(left, y, size - 3, size - 3, colour, 0.3 if n < prompt else 1) for left, n in places]


def position_ids(batch: tuple[tuple[int, int], ...], virtual_tokens: int = 0) -> list[int]:
    """Each row of a batch counts its positions from 0."""
    return [position for prompt, answer in batch for position in range(virtual_tokens + prompt + answer)]


def flow(chinese: bool) -> tuple[int, list[str]]:
    """From rows to an adapter, and what can be done with it."""
    words = [
        ("rows", "JSON, CSV, Parquet"),
        ("preprocess", "tokens and labels"),
        ("train", "LoRA or soft prompt"),
        ("adapter", "a few megabytes"),
        ("inference.py", "answers, labels, scores, chat"),
        ("merge_adapter.py", "a checkpoint for vLLM, Ollama"),
        ("Qwen", "frozen, 16 or 4 bits"),
    ]
    if chinese:
        words = [
            ("数据行", "JSON、CSV、Parquet"),
            ("预处理", "token 和标签"),
            ("训练", "LoRA 或软提示"),
            ("适配器", "几 MB"),
            ("inference.py", "回答、标签、评分、对话"),
            ("merge_adapter.py", "供 vLLM、Ollama 的检查点"),
            ("Qwen", "冻结，16 或 4 bit"),
        ]
    rows, preprocess, train, adapter, inference, merge, qwen = words
    return 170, [
        box(1, 93, 130, 54, *rows, BLUE),
        arrow((131, 120), (151, 120)),
        box(152, 93, 126, 54, *preprocess, GREY),
        arrow((278, 120), (298, 120)),
        box(299, 93, 146, 54, *train, GREY),
        arrow((372, 66), (372, 92)),
        box(299, 12, 146, 54, *qwen, BLUE),
        arrow((445, 120), (465, 120)),
        box(466, 93, 116, 54, *adapter, ORANGE),
        arrow((582, 112), (596, 112), (596, 75), (616, 75)),
        arrow((582, 128), (616, 128)),
        box(617, 40, 212, 54, *inference, GREEN),
        box(617, 104, 212, 54, *merge, GREEN),
    ]


def batch(chinese: bool) -> tuple[int, list[str]]:
    """A padded batch, and the same rows end to end."""
    size, left, longest = 26, 190, max(prompt + answer for prompt, answer in BATCH)
    places, supervised = longest * len(BATCH), sum(answer for _, answer in BATCH)
    used = len(position_ids(BATCH))
    padded = ["padded", f"{places} positions, {places - used} padding", f"logits for all {places}"]
    ours = ["end to end", f"{used} positions, no padding", f"logits for {supervised}"]
    legend = ["prompt", "answer, supervised", "padding", "logits computed here"]
    if chinese:
        padded = ["填充的批次", f"{places} 个位置，{places - used} 个是填充", f"{places} 个位置都算 logits"]
        ours = ["首尾相接", f"{used} 个位置，没有填充", f"只算 {supervised} 个位置的 logits"]
        legend = ["提示", "回答，监督部分", "填充", "在此计算 logits"]

    def mark(x: float, y: float) -> str:
        return f'<circle cx="{x + size / 2:g}" cy="{y + size + 4:g}" r="3" fill="{ORANGE}"/>'

    drawn = [text(1, 30, padded[0], 14, bold=True), text(1, 49, padded[1]), text(1, 67, padded[2])]
    colours = (BLUE, GREEN, PURPLE)
    for number, ((prompt, answer), colour) in enumerate(zip(BATCH, colours, strict=True)):
        y = 12 + 36 * number
        drawn += cells(left, y, size, prompt, answer, colour)
        drawn += [rectangle(left + size * n + 1.5, y, size - 3, size - 3, "") for n in range(prompt + answer, longest)]
        drawn += [mark(left + size * n, y - 3) for n in range(longest)]
    y, x = 150, left
    drawn += [text(1, y + 12, ours[0], 14, bold=True), text(1, y + 31, ours[1]), text(1, y + 49, ours[2])]
    for (prompt, answer), colour in zip(BATCH, colours, strict=True):
        drawn += cells(x, y, size, prompt, answer, colour)
        drawn += [mark(x + size * n, y - 3) for n in range(prompt - 1, prompt + answer - 1)]
        x += size * (prompt + answer)
    for place, position in enumerate(position_ids(BATCH)):
        drawn.append(text(left + size * (place + 0.5), y + 46, str(position), 11, anchor="middle"))
    drawn.append(text(left, y + 66, "position_ids", 11))
    y = 240
    drawn += [rectangle(left, y, 14, 14, BLUE, 0.3), text(left + 22, y + 12, legend[0])]
    drawn += [rectangle(left + 100, y, 14, 14, BLUE), text(left + 122, y + 12, legend[1])]
    drawn += [rectangle(left + 250, y, 14, 14, ""), text(left + 272, y + 12, legend[2])]
    drawn += [f'<circle cx="{left + 371}" cy="{y + 7}" r="3" fill="{ORANGE}"/>', text(left + 382, y + 12, legend[3])]
    return 262, drawn


def soft_prompt(chinese: bool) -> tuple[int, list[str]]:
    """Where the trained vectors of a soft prompt stand in the batch."""
    size, left, y = 38, 120, 96
    trained = ["soft prompt", f"{VIRTUAL_TOKENS} trained vectors"]
    frozen = ["embeddings of Qwen", "frozen, as is the rest of the model"]
    labels = ["one batch", "position_ids"]
    if chinese:
        trained = ["软提示", f"{VIRTUAL_TOKENS} 个可训练的向量"]
        frozen = ["Qwen 的词嵌入", "冻结，模型的其余部分也是"]
        labels = ["一个批次", "position_ids"]
    drawn = [box(left, 8, 200, 50, *trained, ORANGE), text(1, y + 24, labels[0], 14, bold=True)]
    x, starts = left, []
    for (prompt, answer), colour in zip(SOFT_BATCH, (BLUE, GREEN), strict=True):
        starts.append(x)
        drawn += cells(x, y, size, 0, VIRTUAL_TOKENS, ORANGE)
        drawn += cells(x + size * VIRTUAL_TOKENS, y, size, prompt, answer, colour)
        x += size * (VIRTUAL_TOKENS + prompt + answer)
    middle = size * VIRTUAL_TOKENS / 2
    drawn.append(arrow((starts[0] + middle, 58), (starts[0] + middle, y - 4), colour=ORANGE))
    second = starts[1] + middle
    drawn.append(arrow((left + 200, 33), (second, 33), (second, y - 4), colour=ORANGE))
    right = WIDTH - 227
    drawn += [box(right, 8, 226, 50, *frozen, GREY), arrow((right + 106, 58), (right + 106, y - 4))]
    drawn.append(text(1, y + 56, labels[1], 12))
    for place, position in enumerate(position_ids(SOFT_BATCH, VIRTUAL_TOKENS)):
        drawn.append(text(left + size * (place + 0.5), y + 56, str(position), 12, anchor="middle"))
    return 166, drawn


def make_pictures() -> dict[str, str]:
    """The text of each file, by name."""
    files = {}
    for draw in (flow, batch, soft_prompt):
        for chinese in (False, True):
            height, drawn = draw(chinese)
            head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="{FONT}">'
            files[draw.__name__ + ("_zh" if chinese else "") + ".svg"] = "\n".join([head, *drawn, "</svg>", ""])
    return files


def main() -> None:
    for name, picture in make_pictures().items():
        (FOLDER / name).write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
