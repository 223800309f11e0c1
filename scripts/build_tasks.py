"""Build the lm-eval tasks that ship inside the package, out of the bundled evaluation text.

    python scripts/build_tasks.py

`continuation`: which of four sentences comes next; the other three are as long, and come from nearby in the same document and,
as it does, from inside a paragraph. `last_word`: the word that a passage ends with, and that it has used before. `retrieval`: a
number of five digits that one sentence of a long passage names, and the last one asks for.
Items are chosen by rules on the text alone, never by a model's answers. The same text gives the same bytes.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbllm_cli.data.sources import STYLES, builtin_records

OUTPUT = Path(__file__).resolve().parent.parent / "src" / "lbllm_cli" / "data" / "tasks"
SEED = 0
ITEMS = 100  # of each style, for each task; a multiple of the number of choices
LEAST, MOST = 50, 120  # words of a context
SHORTEST, LONGEST = 8, 28  # words of a choice
CHOICES = 4
APART = 10  # sentences from the true continuation to a distractor, at least: what comes right after it may fit as well
NEAREST = 40  # sentences that the distractors are chosen from
ALIKE = 0.2  # how much the length in characters of a distractor differs from the true one's, at most
LENGTHS = (300, 600, 1200)  # words of a passage that a number is retrieved from
PASSAGES = 12  # of each style and length
KEEPERS = ("locker", "drawer", "cabin", "trunk", "stable")
COLOURS = ("red", "green", "white", "brown", "yellow")
FREQUENT = 400  # a word among that many commonest ones of every style belongs to no subject

ABBREVIATIONS = ("Mr", "Mrs", "Dr", "St", "Rev", "Hon", "vs", "cf", "e.g", "i.e", "No", "Vol", "pp")
NOT_ABBREVIATED = "".join(rf"(?<!\b{re.escape(name)}\.)" for name in ABBREVIATIONS) + r"(?<!\b[A-Z]\.)"
SENTENCE_END = re.compile(rf"""(?:(?<=[.!?])|(?<=[.!?]["')])){NOT_ABBREVIATED}\s+(?=["'(]?[A-Z])""")
WHOLE = re.compile(r"""["'(]?[A-Z].*[.!?]["')]?""")
# What prose does not have: pieces of code, options, tables; and a colon that announced code or a list, which is gone.
NOT_PROSE = re.compile(r"""[][=<>{}\\|^~*@#`]|::|\s-{1,2}\w|:["')]?$""")
# What a choice or a last word does not have either: names out of programs, and numbers.
NOT_PLAIN = re.compile(r"""[_/$%()\d]|\w\.\w|\b[a-z]+[A-Z]""")
LAST_WORD = re.compile(r"""(.* )([A-Za-z][a-z]{3,})[.!?]["')]?""")

Item = dict[str, Any]


@dataclass(frozen=True)
class Sentence:
    """One sentence of a document; sentences of one run follow each other without a heading or anything else between them."""

    text: str
    run: int
    opens: bool  # its paragraph
    words: int


@dataclass(frozen=True)
class Candidate:
    """An item that could be taken, and the sentences that it would use up."""

    item: Item
    span: range


def order(text: str) -> bytes:
    """A key that sorts without pattern, the same on every machine and Python."""
    return hashlib.sha256(f"{SEED} {text}".encode()).digest()


def sentences(text: str) -> list[Sentence]:
    """The clean sentences of a document."""
    found: list[Sentence] = []
    run = 0
    entry = False
    for paragraph in re.split(r"\n\s*\n", text):
        split = SENTENCE_END.split(" ".join(paragraph.split()))
        # Lone sentences one after the other are, unless people speak, entries of a list that has lost its labels.
        before, entry = entry, len(split) == 1 and '"' not in paragraph
        run += before and entry
        for at, sentence in enumerate(split):
            if WHOLE.fullmatch(sentence) and not NOT_PROSE.search(sentence):
                found.append(Sentence(sentence, run, at == 0, len(sentence.split())))
            else:
                run += 1
    return found


def contexts(document: list[Sentence], end: int, words: int = 0) -> Iterator[range]:
    """The spans before a sentence that have the words of a context together with `words` others, shortest first."""
    for start in range(end - 1, -1, -1):
        words += document[start].words
        if document[start].run != document[end].run or words > MOST:
            return
        if words >= LEAST:
            yield range(start, end)


def joined(document: list[Sentence], span: range) -> str:
    """The text of a span."""
    return " ".join(document[at].text for at in span)


def may_be_choice(sentence: Sentence) -> bool:
    """Whether a sentence can be the true continuation or a distractor; quotation marks would tell which speech it is from."""
    if sentence.opens or not SHORTEST <= sentence.words <= LONGEST:
        return False
    return '"' not in sentence.text and not NOT_PLAIN.search(sentence.text)


def distractors(document: list[Sentence], true: int, others: Iterable[int]) -> list[str]:
    """Of the nearest of some sentences, those whose length is most like the true continuation's."""
    text, length = document[true].text, len(document[true].text)
    nearest = sorted((at for at in others if abs(at - true) >= APART), key=lambda at: abs(at - true))[:NEAREST]
    texts = dict.fromkeys(document[at].text for at in nearest)
    alike = [other for other in texts if other != text and abs(len(other) - length) <= ALIKE * length]
    return sorted(alike, key=lambda other: abs(len(other) - length))[: CHOICES - 1]


def continuations(document: list[Sentence]) -> Iterator[Candidate]:
    """Items of the continuation task; the true continuation comes first in `choices`."""
    may_be = [at for at, sentence in enumerate(document) if may_be_choice(sentence)]
    for at in may_be:
        context = next(contexts(document, at), None)
        if context is None:
            continue
        choices = [document[at].text, *distractors(document, at, (other for other in may_be if other not in context))]
        before = joined(document, context)
        if len(choices) == CHOICES and not any(choice in before for choice in choices):
            yield Candidate({"context": before, "choices": choices}, range(context.start, at + 1))


def last_words(document: list[Sentence], frequent: set[str]) -> Iterator[Candidate]:
    """Items of the last-word task."""
    for at, sentence in enumerate(document):
        match = LAST_WORD.fullmatch(sentence.text)
        if not match or NOT_PLAIN.search(sentence.text) or match[2].lower() in frequent:
            continue
        for context in contexts(document, at, sentence.words - 1):
            before = f"{joined(document, context)} {match[1].rstrip()}"
            if re.search(rf"\b{match[2]}\b", before):
                item: Item = {"context": before, "word": match[2]}
                yield Candidate(item, range(context.start, at + 1))
                break


def passages(document: list[Sentence], words: int) -> Iterator[list[str]]:
    """Stretches of a document that have that many words, and no figure in them, one after the other."""
    taken: list[str] = []
    count = 0
    for sentence in document:
        if not re.search(r"\d", sentence.text):
            taken.append(sentence.text)
            count += sentence.words
        if count >= words:
            yield taken
            taken, count = [], 0


def retrieval(texts: list[str], words: int) -> Item:
    """An item of the retrieval task: what is asked for stands anywhere in the passage, as often near its end as far from it."""
    key = order(" ".join(texts))
    at, number = int.from_bytes(key[:4]) % len(texts), 10_000 + int.from_bytes(key[4:8]) % 90_000
    named = f"The number of the {COLOURS[key[8] % len(COLOURS)]} {KEEPERS[key[9] % len(KEEPERS)]} is"
    context = " ".join([*texts[:at], f"{named} {number}.", *texts[at:], named])
    return {"words": words, "context": context, "number": str(number)}


def retrievals(documents: dict[str, list[Sentence]], style: str) -> list[Item]:
    """The share of one style; lengths take turns."""
    shares = []
    for words in LENGTHS:
        found = [
            {"style": style, "document": name} | retrieval(texts, words)
            for name, document in documents.items() for texts in passages(document, words)
        ]  # fmt: skip
        shares.append(take(found, PASSAGES))
    return [item for turn in zip(*shares, strict=True) for item in turn]


def frequent_words(documents: dict[str, dict[str, list[Sentence]]]) -> set[str]:
    """Words that are common in every style."""
    common = []
    for style in STYLES:
        texts = (sentence.text for document in documents[style].values() for sentence in document)
        counts = Counter(word for text in texts for word in re.findall(r"[a-z]+", text.lower()))
        common.append({word for word, _ in counts.most_common(FREQUENT)})
    return set.intersection(*common)


def disjoint(candidates: Iterable[Candidate]) -> Iterator[Item]:
    """As many items of one document as there can be without a sentence in two of them; candidates come in order of their ends."""
    end = 0
    for candidate in candidates:
        if candidate.span.start >= end:
            end = candidate.span.stop
            yield candidate.item


def take(items: Iterable[Item], count: int = ITEMS) -> list[Item]:
    """The share of one style."""
    taken = sorted(items, key=lambda item: order(str(item["context"])))[:count]
    if len(taken) < count:
        raise SystemExit(f"only {len(taken)} items of {count}")
    return taken


def shuffle_choices(items: list[Item]) -> None:
    """Give every position the true continuation equally often."""
    for rank, item in enumerate(sorted(items, key=lambda item: order(f"position {item['context']}"))):
        true, *others = item["choices"]
        item["gold"] = rank % CHOICES
        item["choices"] = [*others[: rank % CHOICES], true, *others[rank % CHOICES :]]


def line(item: Item) -> str:
    """An item as the files have it."""
    return json.dumps(item, ensure_ascii=False) + "\n"


def build() -> dict[str, str]:
    """The data files: name and text; styles take turns, so that the first items of a file are a fair sample of it."""
    texts = {style: {r["document"]: sentences(r["text"]) for r in builtin_records("evaluation", style)} for style in STYLES}
    frequent = frequent_words(texts)
    tasks: dict[str, list[list[Item]]] = {"continuation": [], "last_word": [], "retrieval": []}
    for style, documents in texts.items():
        continued, ended = [], []
        for name, document in documents.items():
            marks: Item = {"style": style, "document": name}
            continued += [marks | item for item in disjoint(continuations(document))]
            ended += [marks | item for item in disjoint(last_words(document, frequent))]
        tasks["continuation"].append(take(continued))
        shuffle_choices(tasks["continuation"][-1])
        tasks["last_word"].append(take(ended))
        tasks["retrieval"].append(retrievals(documents, style))
    turns = {task: [item for turn in zip(*styles, strict=True) for item in turn] for task, styles in tasks.items()}
    return {f"{task}.jsonl": "".join(map(line, items)) for task, items in turns.items()}


def main() -> None:
    """Write the data files."""
    for name, text in build().items():
        (OUTPUT / name).write_text(text, encoding="utf-8", newline="\n")
        print(name, text.count("\n"), "items,", len(text.encode()), "bytes")


if __name__ == "__main__":
    main()
