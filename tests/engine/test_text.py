"""Text of tokens as they come, and what a session need not compute again."""

from types import SimpleNamespace

import pytest
from conftest import TOY
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer

from lbllm_cli.core.errors import RunError
from lbllm_cli.engine.location import library_path
from lbllm_cli.engine.model import Model, Sampler, Sampling, Session
from lbllm_cli.engine.text import Decoder, new_tokens

if library_path() is None:
    pytest.skip("this installation has no compiled kernels", allow_module_level=True)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOY)


@pytest.mark.parametrize(
    "text", ["The sea was calm.", "caf\u00e9 \u2013 \U0001f30a\U0001f30a na\u00efve", "  two  spaces\n\nlines\n", "\u65e5\u672c"]
)
def test_pieces_make_up_the_text_and_split_no_character(tokenizer, text):
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoder = Decoder(tokenizer)
    pieces = [decoder.add(token) for token in tokens]
    assert "".join(pieces) + decoder.rest() == tokenizer.decode(tokens)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_text_that_ends_within_a_character_ends_with_what_can_be_read(tokenizer):
    tokens = tokenizer("sea \U0001f30a", add_special_tokens=False)["input_ids"][:-1]
    decoder = Decoder(tokenizer)
    said = "".join(decoder.add(token) for token in tokens)
    assert said + decoder.rest() == tokenizer.decode(tokens)


def of_bytes() -> SimpleNamespace:
    """A tokenizer whose unknown characters are bytes, as Llama 2's is: a line break is <0x0A>."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}, "a": 257, "\u2581b": 258}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return SimpleNamespace(backend_tokenizer=backend)


def test_a_byte_of_no_character_ends_no_text():
    line, stray, word, other = 1 + 0x0A, 1 + 0xF0, 257, 258
    smile = [1 + byte for byte in "\U0001f30a".encode()]
    for tokens, expected in {
        (word, line, stray, word, other, *smile, word): "a\n\ufffda b\U0001f30aa",
        (word, line, stray, word, line, stray, other): "a\n\ufffda\n\ufffd b",
        (word, line, *smile, line): "a\n\U0001f30a\n",
    }.items():
        decoder = Decoder(of_bytes())
        assert "".join(decoder.add(token) for token in tokens) + decoder.rest() == expected


def test_special_tokens_are_no_text(tokenizer):
    decoder = Decoder(tokenizer)
    assert decoder.add(tokenizer.eos_token_id) + decoder.rest() == ""


@pytest.fixture
def session(export_of):
    return Session(Model(export_of("llama-tied"), 1))


def greedy(session) -> Sampler:
    return Sampler(session.model.lib, Sampling(), 0)


def test_what_a_text_shares_with_the_last_one_is_not_computed_again(session, monkeypatch):
    runs = []
    run = session.run
    monkeypatch.setattr(session, "run", lambda tokens: runs.append(len(tokens)) or run(tokens))
    first = list(new_tokens(session, [5, 6, 7, 8], greedy(session), 3, ()))
    assert runs == [4, 1, 1]
    assert session.tokens == [5, 6, 7, 8, *first[:2]]
    # The same text again: of its last token there must be logits.
    assert list(new_tokens(session, [5, 6, 7, 8], greedy(session), 3, ())) == first
    assert runs[3:] == [1, 1, 1]
    list(new_tokens(session, [5, 6, 9], greedy(session), 1, ()))
    assert runs[6:] == [1]


def test_a_text_ends_with_its_last_token_or_its_count(session):
    tokens = list(new_tokens(session, [5, 6, 7], greedy(session), 6, ()))
    assert len(tokens) == 6
    end = tokens[3]
    assert list(new_tokens(session, [5, 6, 7], greedy(session), 6, {end})) == tokens[: tokens.index(end) + 1]
    assert list(new_tokens(session, [5, 6, 7], greedy(session), 0, ())) == []


def test_predictions_that_are_not_finite_end_the_text(session, monkeypatch):
    run = session.run
    monkeypatch.setattr(session, "run", lambda tokens: run(tokens) * float("nan"))
    with pytest.raises(RunError, match="predictions after 3 tokens are not finite"):
        list(new_tokens(session, [5, 6, 7], greedy(session), 2, ()))
