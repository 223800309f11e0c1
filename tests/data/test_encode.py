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


@pytest.fixture
def pieces(monkeypatch):
    """Pieces of 4,096 characters; the list of what `_seam` found."""
    found, real = [], encode._seam
    monkeypatch.setattr(encode, "_PIECE", 1 << 12)
    monkeypatch.setattr(encode, "_OVERLAP", 1 << 9)
    monkeypatch.setattr(encode, "_seam", lambda *of: found.append(real(*of)) or found[-1])
    return found


@pytest.mark.parametrize("name", ["bytes", "pairs", "unigrams", "words"])
@pytest.mark.parametrize("kind", ["book", "odd", "letters", "spaces", "words"])
def test_pieces_give_the_ids_of_the_whole(tokenizers, pieces, name, kind):
    tokenizer = tokenizers[name]
    generator = random.Random(5)
    text = {
        "book": BOOK,
        "odd": "".join(generator.choice(ODD) for _ in range(15_000)),
        "letters": "a" * 20_000,
        "spaces": " " * 20_000,
        "words": "ab " * 7000,
    }[kind]
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert encode.encode(text, tokenizer, "a.txt").tolist() == whole
    assert pieces, "the text was cut"
    if kind in {"book", "odd", "words"}:
        assert None not in pieces


def test_long_and_short_texts_of_a_batch(tokenizers, pieces):
    texts = ["", "short", BOOK[:9000], "", BOOK[100:200], "a" * 4096, "b" * 4097]
    (found,) = encode.batches(iter(texts), tokenizers["bytes"], "a.jsonl")
    each = [tokenizers["bytes"](text, add_special_tokens=False)["input_ids"] for text in texts]
    assert torch.equal(found, torch.tensor([token for ids in each for token in ids]))
    assert pieces
    assert list(encode.batches(iter([]), tokenizers["bytes"], "a.jsonl")) == []


def test_a_text_without_a_place_to_cut_it(tokenizers, pieces, monkeypatch):
    word = "x" + "é" * 20_000
    assert encode.encode(word, tokenizers["words"], "a.txt").numel() == 1
    assert pieces == [None]
    monkeypatch.setattr(encode, "_WHOLE", 10_000)
    with pytest.raises(UsageError, match=r"a\.txt: a text of 20,001 characters cannot be tokenized in pieces, .* into records"):
        encode.encode(word, tokenizers["words"], "a.txt")


def test_no_more_than_a_piece_is_tokenized_at_once(tokenizers, pieces):
    tokenizer, sizes = tokenizers["bytes"], []

    class Watched:
        is_fast = True

        def __call__(self, text, **options):
            sizes.append(len(text) if isinstance(text, str) else sum(map(len, text)))
            return tokenizer(text, **options)

    list(encode.batches(iter([BOOK, *(BOOK[i : i + 1500] for i in range(0, 30_000, 1500))]), Watched(), "a.jsonl"))
    assert len(sizes) > 4
    assert max(sizes) <= encode._AT_ONCE << 12


def test_no_more_is_tokenized_than_is_needed(tokenizers, pieces):
    whole = tokenizers["bytes"](BOOK, add_special_tokens=False, verbose=False)["input_ids"]
    for enough in (1, 1500, 4000):
        found = encode.encode(BOOK, tokenizers["bytes"], "a.txt", enough).tolist()
        assert enough <= len(found) <= enough + 1600
        assert found == whole[: len(found)]
    assert encode.encode(BOOK, tokenizers["bytes"], "a.txt", len(whole) + 1).tolist() == whole
