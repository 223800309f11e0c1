"""From text to tokens: windows, mixtures, evaluation segments, refusals."""

import hashlib
from collections import Counter
from itertools import islice, pairwise

import pytest
import torch
from safetensors.torch import save_file
from texts import calibrate, cut, evaluate, ids_of, numbered, preset, words_of
from torch import Tensor

from lbllm_cli.core.errors import UsageError
from lbllm_cli.data import encode
from lbllm_cli.data import sources as text_sources
from lbllm_cli.data import tokens as data
from lbllm_cli.data.sources import STYLES, builtin_records
from lbllm_cli.recipe.text import Source


def test_tokens_of_one_row(tmp_path, tokenizer):
    item = numbered(tmp_path, "ids", 100, 83)
    text_sources.check(item, evaluating=True)
    assert torch.equal(evaluate([item], tokenizer, 16), torch.arange(100, 180).view(5, 16))
    assert sorted(calibrate([item], tokenizer, 5, 16).tolist()) == cut(list(range(100, 183)), 16)


def test_tokens_in_rows(tmp_path, tokenizer):
    file = tmp_path / "rows.safetensors"
    ids = torch.arange(60, dtype=torch.int32).view(3, 20)
    save_file({"input_ids": ids, "other": torch.zeros(1)}, file)
    item = Source(source=str(file))
    assert sorted(calibrate([item], tokenizer, 3, 16).tolist()) == ids[:, :16].tolist()
    assert torch.equal(evaluate([item], tokenizer, 16), torch.arange(48).view(3, 16))
    assert calibrate([item], tokenizer, 3, 16).dtype == torch.int64
    with pytest.raises(UsageError, match="rows of input_ids have 20 tokens, 32 are needed"):
        calibrate([item], tokenizer, 1, 32)


@pytest.mark.parametrize("tensors", [{"ids": torch.arange(64)}, {"input_ids": torch.rand(64), "ids": torch.arange(64)}])
def test_token_files_without_integer_ids(tmp_path, tokenizer, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=r"expected an integer tensor `input_ids`, it has: .*ids"):
        evaluate([Source(source=str(tmp_path / "a.safetensors"))], tokenizer)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor(7), r"input_ids have the shape \[\], expected \[tokens\] or \[rows, tokens\]"),
        (torch.zeros(2, 3, 16, dtype=torch.int64), r"input_ids have the shape \[2, 3, 16\]"),
        (torch.ones(64, dtype=torch.bool), r"expected an integer tensor `input_ids`, it has: input_ids \(input_ids are bool\)"),
        (torch.ones(64, dtype=torch.float16), r"input_ids are float16"),
        (torch.ones(64, dtype=torch.complex64), r"input_ids are complex64"),
        (torch.tensor([], dtype=torch.int64), "holds 0 tokens"),
        (torch.zeros(0, 16, dtype=torch.int64), "holds 0 tokens"),
        (torch.zeros(3, 0, dtype=torch.int64), "(holds 0 tokens|rows of input_ids have 0 tokens)"),
        (torch.full((64,), -3, dtype=torch.int8), "token ids begin at -3, the vocabulary at 0; wrong tokenizer"),
        (torch.full((64,), 2**63 + 5, dtype=torch.uint64), "token ids begin at -9223372036854775803, the vocabulary at 0"),
        (torch.full((64,), 2**60), "token ids reach 1152921504606846976"),
    ],
)
def test_token_files_of_odd_shapes_and_kinds(tmp_path, tokenizer, ids, message):
    save_file({"input_ids": ids}, tmp_path / "a.safetensors")
    item = Source(source=str(tmp_path / "a.safetensors"))
    with pytest.raises(UsageError, match=message):
        evaluate([item], tokenizer)
    with pytest.raises(UsageError, match=message):
        calibrate([item], tokenizer, 2, 8)


def test_a_start_token_outside_the_vocabulary(tmp_path, tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<beyond>"})
    item = numbered(tmp_path, "ids", 0, 64)
    with pytest.raises(UsageError, match="token ids reach 400, the vocabulary ends at 399"):
        calibrate([item], tokenizer, 2, 16, bos=True, vocab=400)


def test_a_record_must_be_longer_than_a_window(tmp_path, tokenizer):
    text = words_of(0, 30)
    ids = ids_of(tokenizer, text)
    item = preset(tmp_path, "c4", [text])
    with pytest.raises(UsageError, match="holds 0 records of more than"):
        calibrate([item], tokenizer, 1, len(ids))
    for seed in range(8):
        assert calibrate([item], tokenizer, 1, len(ids) - 1, seed).tolist() == [ids[:-1]]


def test_windows_within_records_come_from_the_first_long_ones(tmp_path, tokenizer):
    texts = [words_of(seed, 60) for seed in range(40)]
    ids = [ids_of(tokenizer, text) for text in texts]
    item = preset(tmp_path, "c4", texts)
    for row in calibrate([item], tokenizer, 2, 32).tolist():
        assert any(ids[i][s : s + 32] == row for i in range(8) for s in range(len(ids[i]) - 32))


@pytest.mark.parametrize("count", [3, 12])
def test_windows_do_not_overlap(tmp_path, tokenizer, count):
    rows = calibrate([numbered(tmp_path, "ids", 0, 100)], tokenizer, count, 8)
    assert rows.shape == (count, 8)
    assert all(row[0] % 8 == 0 and row == list(range(row[0], row[0] + 8)) for row in rows.tolist())
    assert len({row[0] for row in rows.tolist()}) == count


def test_the_seed_chooses_the_windows(tmp_path, tokenizer):
    sources = [numbered(tmp_path, "a", 0, 4000), numbered(tmp_path, "b", 5000, 4000)]
    first = calibrate(sources, tokenizer, 16, 8, seed=1)
    assert torch.equal(calibrate(sources, tokenizer, 16, 8, seed=1), first)
    assert not torch.equal(calibrate(sources, tokenizer, 16, 8, seed=2), first)
    starts = (calibrate(sources[:1], tokenizer, 16, 8, seed=seed)[:, 0].tolist() for seed in range(20))
    assert max(start for found in starts for start in found) > 3000, "windows come from all of the text"


def test_bos(tmp_path, tokenizer):
    item = numbered(tmp_path, "ids", 1000, 63)
    rows = calibrate([item], tokenizer, 9, 8, bos=True)
    assert rows[:, 0].tolist() == [tokenizer.bos_token_id] * 9
    assert sorted(rows[:, 1:].tolist()) == cut(list(range(1000, 1063)), 7)
    rows = evaluate([item], tokenizer, 8, bos=True)
    assert rows[:, 0].tolist() == [tokenizer.bos_token_id] * 9
    assert torch.equal(rows[:, 1:].flatten(), torch.arange(1000, 1063))
    tokenizer.bos_token = None
    with pytest.raises(UsageError, match=r"data\.calibration: bos is true and the tokenizer has no BOS token; set bos: false"):
        calibrate([item], tokenizer, 9, 8, bos=True)


def test_too_few_tokens_names_found_and_needed(tmp_path, tokenizer):
    item = numbered(tmp_path, "ids", 0, 4095)
    with pytest.raises(UsageError, match=r"data\.calibration: .*ids\.safetensors holds 4,095 tokens, 4,096 are needed \(64 seq"):
        calibrate([item], tokenizer, 64, 64)
    assert calibrate([item], tokenizer, 63, 64).shape == (63, 64)
    with pytest.raises(UsageError, match=r"data\.evaluation text: .* holds 4,095 tokens, 4,096 are needed \(64 segments x 64\)"):
        evaluate([item], tokenizer, 64, 64)
    with pytest.raises(UsageError, match=r"holds 4,095 tokens, 5,000 are needed \(1 segments x 5000\)"):
        evaluate([item], tokenizer, 5000)


def test_token_ids_outside_the_vocabulary(tmp_path, tokenizer):
    item = numbered(tmp_path, "ids", 0, 64)
    assert evaluate([item], tokenizer, vocab=64).max() == 63
    with pytest.raises(UsageError, match=r"data\.evaluation text: token ids reach 63, the vocabulary ends at 62; wrong tok"):
        evaluate([item], tokenizer, vocab=63)
    with pytest.raises(UsageError, match=r"data\.calibration: token ids reach 63, the vocabulary ends at 62"):
        calibrate([item], tokenizer, 8, 8, vocab=63)
    with pytest.raises(UsageError, match="wrong tokenizer"):
        evaluate([numbered(tmp_path, "negative", -1, 64)], tokenizer)


def _streamed(monkeypatch, texts: list[str]) -> None:
    """The hub has these documents, in every dataset."""
    monkeypatch.setattr("datasets.load_dataset", lambda *of, **more: iter([{"text": text} for text in texts]))


@pytest.mark.parametrize("batch", [1, 3, 16, 256])
@pytest.mark.parametrize("sets", [(6, 5), (6, 5, 4), (1, 9, 1, 2)])
def test_fresh_text_of_the_hub_is_no_text_that_another_set_chose_from(tokenizer, monkeypatch, batch, sets):
    monkeypatch.setattr(encode, "BATCH", batch)
    texts = [f"{number:05d} " * (1 + 7 * number % 20) for number in range(6000)]
    _streamed(monkeypatch, texts)
    place = {}
    for number, text in enumerate(texts):
        place.setdefault(text[:5], number)
    item = Source(source="hub:some/data")
    seen: set[int] = set()
    for index, count in enumerate(sets):
        taken = [sets[:index]] if index else []
        found: set[int] = set()
        for seed in range(6):  # other seeds choose other windows of the same text
            rows = calibrate([item], tokenizer, count, 32, seed=seed, taken=taken)
            found |= {place[word] for row in rows.tolist() for word in tokenizer.decode(row).split() if word in place}
        assert found
        if seen:
            # A record may be cut where a batch of it is not: batches are whole records.
            assert min(found) > max(seen)
        seen |= found


def test_of_sets_that_do_not_follow_each_other_the_last_counts(tokenizer, monkeypatch):
    monkeypatch.setattr(encode, "BATCH", 4)
    _streamed(monkeypatch, [f"{number:05d} " * 9 for number in range(6000)])
    item = Source(source="hub:some/data")
    both = calibrate([item], tokenizer, 3, 32, taken=[(2,), (9, 2), ()])
    assert torch.equal(both, calibrate([item], tokenizer, 3, 32, taken=[(9, 2)]))
    assert not torch.equal(both, calibrate([item], tokenizer, 3, 32, taken=[(9,)]))


def test_what_training_reads_of_the_hub(tokenizer, monkeypatch):
    texts = [words_of(number, 30) for number in range(40)]
    _streamed(monkeypatch, texts)
    monkeypatch.setattr(encode, "BATCH", 16)
    whole = [ids_of(tokenizer, text + "\n\n") for text in texts]
    # Whole batches of documents, until there are four times as many tokens as are needed.
    read = next(whole[: 16 * n] for n in (1, 2, 3) if sum(map(len, whole[: 16 * n])) >= 4 * 24 * 8)
    windows = torch.tensor(cut([token for ids in read for token in ids], 8))
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(3))[:24]
    assert torch.equal(calibrate([Source(source="hub:some/data")], tokenizer, 24, 8, seed=3), windows[chosen])


def test_too_little_text_beside_what_another_set_reads(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(encode, "BATCH", 2)
    texts = [words_of(number, 30) for number in range(10)]
    _streamed(monkeypatch, texts)
    counts = [len(ids_of(tokenizer, text + "\n\n")) for text in texts]
    whole = f"holds {sum(counts):,} tokens"
    with pytest.raises(UsageError, match=f"{whole}, 4,000 are needed .250 sequences x 16.; lower"):
        calibrate([Source(source="hub:some/data")], tokenizer, 250, 16)
    left = (sum(counts) - 2 * 16) // 16
    with pytest.raises(UsageError, match=rf"{whole}, 2 sequences of it are of other sets and \d+ more are left, 4,000"):
        calibrate([Source(source="hub:some/data")], tokenizer, 250, 16, taken=[(2,)])
    for count in range(1, left - 1):  # two places are lost where windows of different sets do not meet
        assert calibrate([Source(source="hub:some/data")], tokenizer, count, 16, taken=[(2,)]).shape == (count, 16)
    item = preset(tmp_path, "c4", texts)
    assert calibrate([item], tokenizer, 8, 16, taken=[(2,)]).shape == (8, 16)
    with pytest.raises(UsageError, match="holds 10 records of more than 16 tokens, 2 of them for other sets, 9 are needed"):
        calibrate([item], tokenizer, 9, 16, taken=[(2,)])
    with pytest.raises(UsageError, match="holds 10 records of more than 16 tokens, 10 of them for other sets, 1 are needed"):
        calibrate([item], tokenizer, 1, 16, taken=[(3, 7)])


@pytest.mark.parametrize("kind", ["hub", "records"])
@pytest.mark.parametrize("records", [40, 150, 400])
@pytest.mark.parametrize("batch", [1, 16, 256])
def test_sets_of_a_short_source_share_no_text(tmp_path, tokenizer, monkeypatch, kind, records, batch):
    """Every set chooses from four times what it needs, of which a short source has not enough for all."""
    monkeypatch.setattr(encode, "BATCH", batch)
    texts = [" ".join(f"{number:03d}{place:02d}" for place in range(9 if kind == "hub" else 20)) for number in range(records)]
    _streamed(monkeypatch, texts)
    item = Source(source="hub:some/data") if kind == "hub" else preset(tmp_path, "c4", texts)
    sets, seen = (6, 5, 9), []
    for index, count in enumerate(sets):
        taken = [sets[:last] for last in range(1, index + 1)]
        rows = calibrate([item], tokenizer, count, 32, taken=taken)
        assert rows.shape == (count, 32)
        assert torch.equal(rows, calibrate([item], tokenizer, count, 32, taken=taken))
        seen.append(rows)
    if kind == "records":
        found = [{word[:3] for row in rows for word in tokenizer.decode(row).split() if len(word) == 5} for rows in seen]
        assert sum(map(len, found)) == len(set.union(*found)) == 20
    else:
        whole = torch.tensor([token for text in texts for token in ids_of(tokenizer, text + "\n\n")])
        every = whole.unfold(0, 32, 1)
        places = sorted(int((every == row).all(1).nonzero()[0]) for rows in seen for row in rows)
        assert all(after - before >= 32 for before, after in pairwise(places))


def test_fresh_records_are_none_of_another_set(tmp_path, tokenizer):
    texts = [f"{number:05d} " * 30 for number in range(60)]
    item = preset(tmp_path, "c4", texts)
    first = {word for seed in range(8) for row in calibrate([item], tokenizer, 4, 32, seed).tolist()
             for word in tokenizer.decode(row).split() if len(word) == 5}  # fmt: skip
    fresh = {word for seed in range(8) for row in calibrate([item], tokenizer, 4, 32, seed, taken=[(4,)]).tolist()
             for word in tokenizer.decode(row).split() if len(word) == 5}  # fmt: skip
    assert max(first) < min(fresh)


def _largest_remainders(weights: list[float], total: int) -> list[int]:
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(value) for value in exact]
    while sum(counts) < total:
        gaps = [value - count for value, count in zip(exact, counts, strict=True)]
        counts[gaps.index(max(gaps))] += 1
    return counts


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [([5, 3, 2], 7, [4, 2, 1]), ([1, 1, 1], 8, [3, 3, 2]), ([0.9, 0.05, 0.05], 4, [4, 0, 0]), ([1, 6], 32, [5, 27])],
)
def test_a_mixture_counts_by_largest_remainders(tmp_path, tokenizer, weights, total, expected):
    assert _largest_remainders(weights, total) == expected
    sources = [
        numbered(tmp_path, str(i), 1000 * i, 400).model_copy(update={"weight": weight}) for i, weight in enumerate(weights)
    ]
    rows = calibrate(sources, tokenizer, total, 8)
    which = [row[0] // 1000 for row in rows.tolist()]
    assert [which.count(i) for i in range(len(weights))] == expected
    assert len({row[0] for row in rows.tolist()}) == total
    for prefix in range(1, total + 1):
        for i, count in enumerate(expected):
            assert abs(which[:prefix].count(i) - prefix * count / total) <= 1, "every prefix is mixed"


def test_a_text_that_is_named_twice_gives_no_window_twice(tmp_path, tokenizer):
    """Also where other sets of the same mixture have theirs, and where one of the two repeats passages."""
    ids = numbered(tmp_path, "ids", 0, 400)
    sources = [ids.model_copy(update={"weight": weight}) for weight in (3, 1)] + [numbered(tmp_path, "more", 1000, 400)]
    first = calibrate(sources, tokenizer, 20, 8)
    fresh = calibrate(sources, tokenizer, 12, 8, taken=[(20,)])
    begins = [row[0] for row in (*first.tolist(), *fresh.tolist())]
    assert len(set(begins)) == len(begins) == 32
    assert sum(begin < 1000 for begin in begins[:20]) == 16
    # What is named once is drawn as it always was.
    assert torch.equal(calibrate([ids], tokenizer, 5, 8), calibrate([ids.model_copy(update={"weight": 3})], tokenizer, 5, 8))


def test_generated_text_is_asked_for_its_share(tmp_path, tokenizer):
    asked = []

    def sample(item: Source, rows: int, length: int) -> Tensor:
        asked.append((item.temperature, rows, length))
        return torch.full((rows, length), 7)

    generated = Source(source="generate:", temperature=0.5)
    counting = numbered(tmp_path, "ids", 1000, 400)
    rows = calibrate([generated, counting], tokenizer, 8, 16, bos=True, sampler=sample)
    assert asked == [(0.5, 4, 15)]
    assert rows[:, 1].tolist()[::2] == [7] * 4
    assert rows.shape == (8, 16)
    calibrate([generated.model_copy(update={"weight": 0.001}), counting], tokenizer, 8, 16)


def test_sampled_text_that_is_named_twice_is_sampled_once(tmp_path, tokenizer):
    """Asked for twice with one seed the model would write the same again."""
    asked = []

    def sample(item: Source, rows: int, length: int) -> Tensor:
        asked.append(rows)
        return torch.arange(rows * length).view(rows, length)

    twice = [Source(source="generate:"), Source(source="generate:", weight=3)]
    rows = calibrate(twice, tokenizer, 8, 16, sampler=sample)
    assert asked == [8]
    assert len({tuple(row) for row in rows.tolist()}) == 8


def test_the_bundled_calibration_text_is_its_styles_in_equal_shares(tokenizer, monkeypatch):
    monkeypatch.setattr(text_sources, "builtin_records", lambda *of: islice(builtin_records(*of), 12))
    rows = calibrate([Source(source="builtin:calibration")], tokenizer, 9, 64)
    whole = {style: "".join(r["text"] + "\n\n" for r in islice(builtin_records("calibration", style), 12)) for style in STYLES}
    found = []
    for row in rows.tolist():
        (style,) = (style for style, text in whole.items() if tokenizer.decode(row).strip("\ufffd") in text)
        found.append(style)
    assert found == list(STYLES) * 3

    expanded = text_sources.expand([Source(source="builtin:calibration", weight=6.0), Source(source="c4", weight=2.0)])
    assert [(item.source, item.weight) for item in expanded] == [
        *((f"builtin:calibration/{style}", 2.0) for style in STYLES),
        ("c4", 2.0),
    ]


def test_segments_start_at_the_start_of_the_text(tokenizer):
    text = next(builtin_records("evaluation", "technical"))["text"]
    ids = ids_of(tokenizer, text + "\n\n")
    rows = evaluate([Source(source="builtin:evaluation/technical")], tokenizer, 32, 5)
    assert rows.tolist() == cut(ids, 32)[:5]
    assert rows.dtype == torch.int64


def test_segments_of_several_sources_follow_each_other(tmp_path, tokenizer):
    sources = [numbered(tmp_path, "a", 0, 20), numbered(tmp_path, "b", 20, 20)]
    assert torch.equal(evaluate(sources, tokenizer, 8), torch.arange(40).view(5, 8))
    weighted = [item.model_copy(update={"weight": weight}) for item, weight in zip(sources, (2.0, 1.0), strict=True)]
    with pytest.raises(UsageError, match="weights are shares of its segments; set segments"):
        evaluate(weighted, tokenizer, 8)


def test_several_sources_share_the_segments(tmp_path, tokenizer):
    sources = [numbered(tmp_path, "a", 0, 20), numbered(tmp_path, "b", 20, 20)]
    weighted = [item.model_copy(update={"weight": weight}) for item, weight in zip(sources, (2.0, 1.0), strict=True)]
    expected = torch.cat([torch.arange(16), torch.arange(20, 28)]).view(3, 8)
    assert torch.equal(evaluate(weighted, tokenizer, 8, 3), expected)
    # The first text alone would do for one segment of each.
    assert torch.equal(evaluate(sources, tokenizer, 8, 2), expected[[0, 2]])
    with pytest.raises(UsageError, match=r"a\.safetensors holds 20 tokens, 24 are needed \(3 segments x 8\)"):
        evaluate(sources, tokenizer, 8, 6)
    styles = [Source(source=f"builtin:evaluation/{style}") for style in STYLES]
    whole = evaluate([Source(source="builtin:evaluation")], tokenizer, 32, 6)
    assert torch.equal(whole, torch.cat([evaluate([style], tokenizer, 32, 2) for style in styles]))


def test_the_hash_covers_content_and_shape():
    tokens = torch.arange(6).view(2, 3)
    expected = hashlib.sha256(b"(2, 3)" + b"".join(i.to_bytes(8, "little") for i in range(6))).hexdigest()
    assert data.tokens_hash(tokens) == expected
    assert data.tokens_hash(tokens.t().contiguous().t()) == expected
    changed = tokens.clone()
    changed[1, 2] = 9
    others = [changed, tokens.view(3, 2), tokens.view(6), tokens.flip(0)]
    assert Counter(data.tokens_hash(other) for other in (tokens, *others)).most_common(1)[0][1] == 1
