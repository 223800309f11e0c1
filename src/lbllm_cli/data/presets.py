"""Datasets of the Hugging Face hub by a short name, in the forms that papers about quantization use them in."""

from dataclasses import dataclass

# Of a web corpus without a convention of its own: as many first documents and tokens as of c4.
_RECORDS, _TOKENS = 1100, 256 * 2048


@dataclass(frozen=True)
class Part:
    """Files of a part: their split's name, which a local folder has too, and their names in the repository; * for many."""

    split: str
    files: str


@dataclass(frozen=True)
class Preset:
    """A hub dataset as papers use it (the GPTQ code's loaders are the common ancestor).

    repository, revision: where its files lie; revision None: the newest. key: field of a record that holds the text, or the
    messages of a chat, which the tokenizer's template renders. joiner: text put between records before tokenizing; None: windows
    are cut from single records longer than a sequence, a random window of each (calibration). Chats follow each other without
    one, in windows from the part of the stream that is read. evaluation_records: records that the evaluation text is made of,
    evaluation_tokens: how many of its tokens count; None: all. instead: presets to use where the repository is gone; the name
    then stands for a local file alone.
    """

    repository: str
    key: str
    joiner: str | None
    calibration: Part
    evaluation: Part | None = None
    evaluation_joiner: str = " "
    evaluation_records: int | None = None
    evaluation_tokens: int | None = None
    revision: str | None = None
    chat: bool = False
    instead: tuple[str, ...] = ()

    @property
    def messages_key(self) -> str | None:
        """The field that holds messages; None where `key` holds text."""
        return self.key if self.chat else None

    @property
    def within_records(self) -> bool:
        """Whether windows are cut from single records."""
        return self.joiner is None


def alternatives(name: str | None, evaluating: bool) -> list[str]:
    """Presets that can stand in for one: of the same kind, with the part that is wanted. None: all that there are."""
    there = {other: preset for other, preset in PRESETS.items() if not preset.instead and other != name}
    if name is None:
        return list(there)
    wanted = PRESETS[name]
    same = (wanted.chat, wanted.within_records)
    alike = [other for other, preset in there.items() if (preset.chat, preset.within_records) == same]
    return list(wanted.instead) or [other for other in alike if there[other].evaluation is not None or not evaluating]


def preset_of(repository: str) -> str | None:
    """The preset that reads a repository, if one does."""
    return next((name for name, preset in PRESETS.items() if preset.repository == repository), None)


# wikitext2 joins all lines by a blank line; ptb joins sentences by a space, and its repository holds a script, which `datasets`
# no longer runs: the hub's own conversion has the files. c4 calibrates on random windows of random documents of the first
# training file and evaluates on the first 1,100 validation documents joined by a space, cut to 256 segments of 2,048 tokens; the
# web corpora after it draw windows as c4 does. redpajama is the training text of LBLLM and EfficientQAT.
PRESETS = {
    "wikitext2": Preset(
        "Salesforce/wikitext", "text", "\n\n",
        Part("train", "wikitext-2-raw-v1/train-00000-of-00001.parquet"),
        Part("test", "wikitext-2-raw-v1/test-00000-of-00001.parquet"), evaluation_joiner="\n\n",
    ),
    "ptb": Preset(
        "ptb-text-only/ptb_text_only", "sentence", " ",
        Part("train", "penn_treebank/train/0000.parquet"), Part("test", "penn_treebank/test/0000.parquet"),
        revision="refs/convert/parquet",
    ),
    "c4": Preset(
        "allenai/c4", "text", None,
        Part("train", "en/c4-train.00000-of-01024.json.gz"), Part("validation", "en/c4-validation.00000-of-00008.json.gz"),
        evaluation_records=_RECORDS, evaluation_tokens=_TOKENS,
    ),
    "fineweb-edu": Preset("HuggingFaceFW/fineweb-edu", "text", None, Part("train", "sample/10BT/*.parquet")),
    "slimpajama": Preset(
        "DKYoon/SlimPajama-6B", "text", None,
        Part("train", "data/train-*.parquet"), Part("validation", "data/validation-*.parquet"),
        evaluation_records=_RECORDS, evaluation_tokens=_TOKENS,
    ),
    "dclm": Preset(
        "mlfoundations/dclm-baseline-1.0-parquet", "text", None,
        Part(
            "train",
            "filtered/OH_eli5_vs_rw_v2_bigram_200k_train/fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train/"
            "processed_data/global-shard_01_of_10/local-shard_0_of_10/*.parquet",
        ),
    ),
    "ultrachat": Preset(
        "HuggingFaceH4/ultrachat_200k", "messages", "",
        Part("train_sft", "data/train_sft-*.parquet"), Part("test_sft", "data/test_sft-*.parquet"), evaluation_joiner="",
        evaluation_records=_RECORDS, evaluation_tokens=_TOKENS, chat=True,
    ),
    "smoltalk": Preset(
        "HuggingFaceTB/smoltalk", "messages", "",
        Part("train", "data/all/train-*.parquet"), Part("test", "data/all/test-*.parquet"), evaluation_joiner="",
        evaluation_records=_RECORDS, evaluation_tokens=_TOKENS, chat=True,
    ),
    "redpajama": Preset(
        "togethercomputer/RedPajama-Data-1T-Sample", "text", None, Part("train", "*.jsonl"),
        instead=("fineweb-edu", "slimpajama"),
    ),
}  # fmt: skip
