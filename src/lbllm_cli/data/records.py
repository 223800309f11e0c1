"""Records of local files and save_to_disk folders: mappings, or whatever a file has in their place."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError, reason

# Characters of one record. More is no text to train on, but a file that lacks its line ends, or zeros that gzip unfolds.
RECORD_LIMIT = 64 << 20
_READ = 1 << 20


def local_records(path: Path, split: str) -> Iterator[Any]:
    """Records of a file or folder; split: the one read of a folder that has several.

    Raises UsageError when it cannot be read.
    """
    try:
        if path.is_dir():
            yield from _folder_records(path, split)
        elif path.suffix == ".parquet":
            yield from _parquet_records(path)
        else:
            yield from _json_records(path)
    except UsageError:
        raise
    except Exception as error:  # OSError, EOFError, zlib.error, and what pyarrow and datasets raise has no common base
        raise UsageError(f"{path} cannot be read: {reason(error)}") from None


def _folder_records(path: Path, split: str) -> Iterator[Any]:
    import datasets

    for file in path.rglob("*"):
        if not file.is_dir():
            files.check_regular(file)  # datasets would wait for a pipe
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise UsageError(f"{path} has no split {split}; it has {', '.join(loaded)}; set split")
        loaded = loaded[split]
    yield from loaded.with_format(None)  # of numpy or torch it would give arrays for lists


def _parquet_records(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as parquet

    files.check_regular(path)
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=64):
            yield from batch.to_pylist()


def _json_records(path: Path) -> Iterator[Any]:
    files.check_regular(path)
    encoding = "utf-8-sig"  # a byte order mark is none of the text's characters
    with gzip.open(path, "rt", encoding=encoding) if path.suffix == ".gz" else path.open(encoding=encoding) as handle:
        as_list = path.name.removesuffix(".gz").endswith(".json") and handle.read(256).lstrip().startswith("[")
        handle.seek(0)
        yield from _json_list(path, handle) if as_list else _json_lines(path, handle)


def _json_lines(path: Path, handle: TextIO) -> Iterator[Any]:
    number = 0
    while line := handle.readline(RECORD_LIMIT + 1):
        number += 1
        if len(line) > RECORD_LIMIT:
            raise UsageError(f"{path}:{number} has more than {RECORD_LIMIT:,} characters; expected one record a line")
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError:
                raise UsageError(f"{path}:{number} is not JSON; expected one record a line") from None
            except RecursionError:
                raise UsageError(f"{path}:{number} is JSON that is nested too deeply") from None


def _json_list(path: Path, handle: TextIO) -> Iterator[Any]:
    """Elements of the one list that fills a file, read on as they are needed: files of gigabytes are written so."""
    window = _Window(handle)
    window.step()  # the bracket: `_json_records` has seen it
    number, mark = 1, "," if window.peek() != "]" else window.step()
    while mark == ",":
        try:
            yield window.value()
        except (ValueError, RecursionError) as error:
            what = "nested too deeply" if isinstance(error, RecursionError) else "not JSON, or has too many characters"
            raise UsageError(f"{path} cannot be read: record {number} is {what}") from None
        number, mark = number + 1, window.step()
    if mark != "]" or window.peek():
        raise UsageError(f"{path} cannot be read: after record {number - 1} the list does not go on and not end")


class _Window:
    """The part of a file that is being parsed."""

    def __init__(self, handle: TextIO):
        self.handle = handle
        self.text, self.place = "", 0

    def peek(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            while self.place < len(self.text):
                if not self.text[self.place].isspace():
                    return self.text[self.place]
                self.place += 1
            self.text, self.place = self.handle.read(_READ), 0
            if not self.text:
                return ""

    def step(self) -> str:
        """`peek`, and goes past it."""
        mark = self.peek()
        self.place += 1
        return mark

    def value(self) -> Any:
        """The next value. Raises ValueError where there is none, or none of at most RECORD_LIMIT characters."""
        self.peek()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.place)
            except ValueError:
                end = len(self.text)
            # At the end of what was read a number may go on: 3.5e of 3.5e1.
            if end < len(self.text) and self.text[end] in ",] \t\r\n":
                self.place = end
                return value
            more = self.handle.read(max(_READ, len(self.text) - self.place))
            self.text, self.place = self.text[self.place :] + more, 0
            if not more or len(self.text) > RECORD_LIMIT:
                raise ValueError
