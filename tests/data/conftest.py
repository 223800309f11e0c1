"""A small tokenizer, and texts."""

from itertools import islice

import pytest
from texts import words_of
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import PreTrainedTokenizerFast

from lbllm_cli.data.sources import builtin_records


@pytest.fixture(scope="module")
def trained():
    """A byte-level BPE, as text."""
    tokenizer = ByteLevelBPETokenizer()
    texts = [record["text"] for record in islice(builtin_records("evaluation", "novels"), 2)]
    tokenizer.train_from_iterator(texts, vocab_size=400, special_tokens=["<s>"], show_progress=False)
    return tokenizer.to_str()


@pytest.fixture
def tokenizer(trained):
    """The tokenizer, with a BOS token and without a chat template."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained), bos_token="<s>")


@pytest.fixture
def texts():
    """Documents of different lengths, one of them empty."""
    return [words_of(seed, 5 + 17 * seed) for seed in range(12)] + ["", "Füße, naïve — 模型"]


@pytest.fixture(autouse=True)
def _quiet():
    import datasets

    datasets.disable_progress_bars()
