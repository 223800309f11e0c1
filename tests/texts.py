"""What tests of text and tokens share: sources of every kind, and their tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lbllm_cli.data import tokens as data
from lbllm_cli.data.presets import PRESETS
from lbllm_cli.recipe.text import EvaluationSet, Source, TokenSet

SENTENCE = "the river bank note seven under table glass moves slowly between old stones and we measured its height again"
VOCAB = 100_000
KINDS = ["jsonl", "lines.json", "list.json", "indented.json", "parquet", "folder", "splits"]


def words_of(seed: int, words: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    known = SENTENCE.split()
    return " ".join(known[i] for i in torch.randint(0, len(known), (words,), generator=generator).tolist())


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def calibrate(sources: list[Source], tokenizer: Any, sequences: int, length: int, seed: int = 0, **more: Any) -> Tensor:
    """taken: sizes of other sets of the same sources, that follow each other in a tuple."""
    spec = TokenSet(source=sources, sequences=sequences, length=length, bos=more.pop("bos", False))
    taken = [[(sources, size) for size in sizes] for sizes in more.pop("taken", ())]
    sampler = more.pop("sampler", lambda *_: pytest.fail("nothing is to be sampled"))
    draw = data.Draw(seed, sampler, "data.calibration", taken, [sources])
    return data.training_tokens(spec, tokenizer, more.pop("vocab", VOCAB), draw, **more)


def evaluate(sources: list[Source], tokenizer: Any, length: int = 8, segments: int | None = None, **more: Any) -> Tensor:
    spec = EvaluationSet(name="text", source=sources, length=length, segments=segments, bos=more.pop("bos", False))
    return data.evaluation_tokens(spec, tokenizer, more.pop("vocab", VOCAB))


def cut(ids: list[int], length: int) -> list[list[int]]:
    """Every whole window of `length` ids, from the start."""
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def numbered(tmp_path: Path, name: str, start: int, count: int) -> Source:
    """A pre-tokenized source whose ids tell their own place."""
    file = tmp_path / f"{name}.safetensors"
    save_file({"input_ids": torch.arange(start, start + count)}, file)
    return Source(source=str(file))


def written(tmp_path: Path, kind: str, records: list[dict[str, Any]]) -> Source:
    """Records in a file or folder of some kind."""
    import datasets

    path = tmp_path / f"records.{kind}"
    lines = "\n".join(json.dumps(record) for record in records)
    if kind == "jsonl":
        path.write_text(lines + "\n\n", encoding="utf-8")
    elif kind == "lines.json":
        path.write_text(lines, encoding="utf-8")
    elif kind == "list.json":
        path.write_text(json.dumps(records), encoding="utf-8")
    elif kind == "indented.json":
        path.write_text("\n " + json.dumps(records, indent=2, ensure_ascii=False), encoding="utf-8")
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=5)
    elif kind == "folder":
        datasets.Dataset.from_list(records).save_to_disk(str(path))
    else:
        other = datasets.Dataset.from_list([{"text": "of another split"}])
        datasets.DatasetDict({"other": other, "dev": datasets.Dataset.from_list(records)}).save_to_disk(str(path))
        return Source(source=str(path), split="dev")
    return Source(source=str(path))


def preset(tmp_path: Path, name: str, texts: list[str]) -> Source:
    """A preset on a local file with its schema."""
    item = written(tmp_path, "jsonl", [{PRESETS[name].key: text, "meta": "unused"} for text in texts])
    return Source(source=name, path=item.source)
