"""Tables in Markdown pages: what stands between two lines such as <!-- memory --> and <!-- /memory --> is replaced."""

import re
from pathlib import Path

from finetuning.cli.console import fail


def marks(name: str) -> re.Pattern[str]:
    return re.compile(f"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)


def find_pages(names: str | None, name: str) -> list[Path]:
    """The pages in `--report`, commas between, each with one place for the table `name`."""
    pages = [Path(page) for page in names.split(",")] if names else []
    for page in pages:
        if not page.is_file() or len(marks(name).findall(page.read_text(encoding="utf-8"))) != 1:
            fail(f"--report '{page}' is not a file with one line <!-- {name} --> and, below, one <!-- /{name} -->")
    return pages


def write_table(pages: list[Path], name: str, table: str) -> None:
    for page in pages:
        text = page.read_text(encoding="utf-8")
        page.write_text(marks(name).sub(lambda _: f"\n{table}\n\n", text), encoding="utf-8")
