"""The rows of tables, read one after the other: CSV, TSV and Parquet."""

import csv
from collections.abc import Iterator
from typing import IO, Any

from pyarrow.parquet import ParquetFile

from finetuning.cli.console import fail, first_line
from finetuning.preprocessing.json_rows import LONGEST, parse_json
from finetuning.preprocessing.schema import EXAMPLE, list_names

# Columns that hold a conversation as JSON text, and those whose empty cells are as if they were not there.
JSON_COLUMNS = ("messages", "conversations", "history")
ABSENT_IF_EMPTY = (*JSON_COLUMNS, "system", "reasoning_content", "task")


def read_table(path: str, lines: Iterator[str], delimiter: str) -> Iterator[tuple[str, Any]]:
    """The rows of a CSV or TSV file with a header line. All values are text, but those of JSON_COLUMNS."""
    csv.field_size_limit(LONGEST)
    reader, names, number = csv.reader(lines, delimiter=delimiter, strict=True), None, 0
    place, count = "line 1", 0
    try:
        for cells in reader:
            place, number = f"line {number + 1}", reader.line_num
            if not any(cells):  # a blank line, or commas only
                continue
            if names is None:
                names = column_names(f"{path}: {place}", cells)
                if len(names) == 1 and {";", "\t"} & set(names[0]):
                    fail(f"{path}: {place}: holds one column ({list_names(names)}); separate columns by commas")
                continue
            if len(cells) != len(names):
                fail(f"{path}: {place}: has {len(cells)} fields, and the header {len(names)}; put texts in quotes")
            row = zip(names, cells, strict=True)
            row = {name: cell for name, cell in row if cell or name not in ABSENT_IF_EMPTY}
            yield place, parse_json_columns(f"{path}: {place}", row)
            count += 1
    except csv.Error as error:
        fail(f"{path}: line {number + 1}: not valid CSV: {error}; is a quotation mark missing?")
    if not count:
        fail(f"{path}: has a header but no rows; it should hold rows like {EXAMPLE}")


def column_names(place: str, names: list[str]) -> list[str]:
    """The header of a table; a column without a name, such as pandas' index, gets one."""
    names = [name or f"column {number}" for number, name in enumerate(names, 1)]
    if len(set(names)) < len(names):
        fail(f"{place}: two columns have the same name ({list_names(names)}); rename one")
    return names


def parse_json_columns(place: str, row: dict[str, Any]) -> dict[str, Any]:
    for name in JSON_COLUMNS:
        if isinstance(row.get(name), str):
            row[name] = parse_json(f"{place}: '{name}' in a table must be JSON text", row[name])
    return row


def read_parquet(path: str, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """The rows of a Parquet file. What is null in a row is left out of it."""
    number = 0
    with ParquetFile(file, pre_buffer=False, page_checksum_verification=True) as table:
        column_names(path, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=500):
            try:
                rows = batch.to_pylist()
            except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date of the year 10,000
                fail(f"{path}: a row after row {number} cannot be read: {first_line(error)}")
            for row in rows:
                number += 1
                yield f"row {number}", parse_json_columns(f"{path}: row {number}", without_nulls(row))
    if not number:
        fail(f"{path}: holds no rows; it should hold rows like {EXAMPLE}")


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value
