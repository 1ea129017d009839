"""The answered rows of a data file, written as they come, so that an interrupted run resumes where it stopped.

Answers come in the order of their length. They are collected in `OUTPUT_FILE.partial`, one JSON object a line, the
first of which records the settings; when all are there, they go to the output file in the order of the rows.
"""

import json
import os
from pathlib import Path
from typing import Any

from finetuning.cli.console import fail, say
from finetuning.preprocessing.rows import as_json


class Predictions:
    """The predictions for the rows of a file: for each row number, from 0, a dict with `prediction` and more."""

    def __init__(self, output_file: str | None, settings: dict[str, Any]) -> None:
        """Open the partial file, and read back what an interrupted run left in it; a run with other settings, which are
        everything that the predictions depend on, is refused. Without a file, the predictions are kept in memory."""
        self.output_file = output_file
        self.by_row: dict[int, dict[str, Any]] = {}
        self.file = None
        if output_file is None:
            return
        self.partial = Path(output_file + ".partial")
        try:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.partial, "ab+")
        except OSError as error:
            fail(f"--output_file '{output_file}' cannot be written: {error.strerror}")
        self.file.seek(0)
        content = self.file.read()
        complete = content[: content.rfind(b"\n") + 1]  # a killed run may leave half a line
        self.file.truncate(len(complete))
        if not complete:
            self.write({"settings": settings})
            return
        try:
            head, *lines = map(json.loads, complete.splitlines())
            saved = dict(head["settings"])
            self.by_row = {line.pop("row"): line for line in lines}
        except (ValueError, TypeError, KeyError, AttributeError):
            fail(f"'{self.partial}' does not hold answers of this program: remove it, or name another --output_file")
        for name, value in json.loads(json.dumps(settings)).items():
            if saved.get(name) != value:
                fail(
                    f"'{self.partial}' was started with {name} {saved.get(name)}, not {value};\n"
                    "repeat the command that started it, remove it, or name another --output_file"
                )
        say(f"resuming after the {len(self.by_row)} rows in '{self.partial}'")

    def add(self, numbers: list[int], predictions: list[dict[str, Any]]) -> None:
        """Keep the predictions of a batch of rows."""
        for number, prediction in zip(numbers, predictions, strict=True):
            self.by_row[number] = prediction
            if self.file:
                self.write({"row": number} | prediction)

    def write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self.file.flush()

    def in_order(self) -> list[dict[str, Any]]:
        return [self.by_row[number] for number in sorted(self.by_row)]

    def finish(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Join rows and predictions, in the rows' order, and write them to the output file."""
        answered = [row | prediction for row, prediction in zip(rows, self.in_order(), strict=True)]
        if self.file:
            self.file.close()
            complete = Path(self.output_file + ".complete")
            lines = [as_json(row) + "\n" for row in answered]
            complete.write_text("".join(lines), encoding="utf-8")
            os.replace(complete, self.output_file)
            self.partial.unlink()
        return answered
