"""Long texts are tokenized in pieces, and give the ids of the whole."""

import random

import pytest
import torch
from conftest import TOY
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lbllm_cli.core.errors import UsageError
from lbllm_cli.data import encode
from lbllm_cli.data.sources import builtin_records

BOOK = next(builtin_records("evaluation", "novels"))["text"][:60_000]
ODD = ["a", "é", "模型", " ", "  ", "\n", "\n\n\n", "😀", "👩‍👧", "e\u0301", "ﬁ", "\t", "12345", "don't", "\u3000", "<unk>", "ß"]


def _trained(model, trainer, **parts) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator([BOOK[i : i + 2000] for i in range(0, 40_000, 2000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def tokenizers():
    """Every kind there is: bytes and pairs by words as in Llama 3, pairs without words as in Llama 2, unigrams, word pieces."""
    options = {"vocab_size": 600, "special_tokens": ["<unk>"], "show_progress": False}
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return {
        "bytes": AutoTokenizer.from_pretrained(TOY),
        "pairs": _trained(
            models.BPE(unk_token="<unk>"), trainers.BpeTrainer(max_token_length=12, **options), normalizer=spaces
        ),
        "unigrams": _trained(
            models.Unigram(), trainers.UnigramTrainer(unk_token="<unk>", **options), pre_tokenizer=pre_tokenizers.Metaspace()
        ),
        "words": _trained(
            models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(**options),
            normalizer=normalizers.BertNormalizer(), pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        ),
    }  # fmt: skip


PIECE = 1 << 12


class Watched:
    """A tokenizer. calls: how many characters the texts of each of its calls have."""

    is_fast = True

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.calls: list[list[int]] = []

    def __call__(self, text, **options):
        self.calls.append([len(text)] if isinstance(text, str) else list(map(len, text)))
        return self.tokenizer(text, **options)


@pytest.fixture
def watched(tokenizers, monkeypatch):
    """watched(name): a tokenizer that gets pieces of 4,096 characters, and remembers what it was given."""
    monkeypatch.setattr(encode, "_PIECE", PIECE)
    monkeypatch.setattr(encode, "_OVERLAP", 1 << 9)
    return lambda name: Watched(tokenizers[name])


@pytest.mark.parametrize("name", ["bytes", "pairs", "unigrams", "words"])
@pytest.mark.parametrize("kind", ["book", "odd", "letters", "spaces", "words"])
def test_pieces_give_the_ids_of_the_whole(watched, name, kind):
    tokenizer = watched(name)
    generator = random.Random(5)
    text = {
        "book": BOOK,
        "odd": "".join(generator.choice(ODD) for _ in range(15_000)),
        "letters": "a" * 20_000,
        "spaces": " " * 20_000,
        "words": "ab " * 7000,
    }[kind]
    whole = tokenizer.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert encode.encode(text, tokenizer, "a.txt").tolist() == whole
    assert max(tokenizer.calls[0]) == PIECE, "the text was cut"
    if kind in {"book", "odd", "words"}:
        assert max(map(max, tokenizer.calls)) == PIECE, "and never tokenized as a whole"


def test_long_and_short_texts_of_a_batch(watched):
    texts = ["", "short", BOOK[:9000], "", BOOK[100:200], "a" * 4096, "b" * 4097]
    tokenizer = watched("bytes")
    (found,) = encode.batches(iter(texts), tokenizer, "a.jsonl")
    assert 9000 not in [size for sizes in tokenizer.calls for size in sizes]
    each = [tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert torch.equal(found, torch.tensor([token for ids in each for token in ids]))
    assert list(encode.batches(iter([]), tokenizer, "a.jsonl")) == []


def test_a_text_without_a_place_to_cut_it(watched, monkeypatch):
    word, tokenizer = "x" + "é" * 20_000, watched("words")
    assert encode.encode(word, tokenizer, "a.txt").numel() == 1
    assert max(tokenizer.calls[0]) == PIECE
    assert tokenizer.calls[-1] == [20_001]
    monkeypatch.setattr(encode, "_WHOLE", 10_000)
    with pytest.raises(UsageError, match=r"a\.txt: a text of 20,001 characters cannot be tokenized in pieces, .* into records"):
        encode.encode(word, tokenizer, "a.txt")


def test_no_more_than_a_piece_is_tokenized_at_once(watched):
    tokenizer = watched("bytes")
    list(encode.batches(iter([BOOK, *(BOOK[i : i + 1500] for i in range(0, 30_000, 1500))]), tokenizer, "a.jsonl"))
    assert len(tokenizer.calls) > 4
    assert max(map(sum, tokenizer.calls)) <= 2 * PIECE


def test_no_more_is_tokenized_than_is_needed(watched):
    tokenizer = watched("bytes")
    whole = tokenizer.tokenizer(BOOK, add_special_tokens=False, verbose=False)["input_ids"]
    for enough in (1, 1500, 4000):
        found = encode.encode(BOOK, tokenizer, "a.txt", enough).tolist()
        assert enough <= len(found) <= enough + 1600
        assert found == whole[: len(found)]
    assert encode.encode(BOOK, tokenizer, "a.txt", len(whole) + 1).tolist() == whole
