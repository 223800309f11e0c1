"""A tokenizer as GGUF has it: tokens, their kinds, merges or scores, and the name of the rule that cuts text before."""

from pathlib import Path
from typing import Any

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError

_BYTES = "<0x{:02X}>"
# Regular expressions of tokenizer.json, by llama.cpp's names of what cuts alike.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {
    f"{_CONTRACTIONS}\\p{{N}}{_REST}": "qwen2",
    f"{_CONTRACTIONS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe",
}
_WHAT_ELSE = "export packed, compressed-tensors or dense instead"


class Vocabulary:
    """Of a model folder whose tokenizer is a tokenizer.json with byte-pair merges. rows: of the embedding.

    kind: "gpt2", bytes in merges' alphabet; or "llama", spaces as U+2581 and single bytes as tokens of their own. Raises
    UsageError for a tokenizer that llama.cpp has no name for.
    """

    def __init__(self, folder: Path, rows: int):
        self.folder, self.rows = folder, rows
        path = folder / "tokenizer.json"
        if not path.exists():
            raise UsageError(f"export.format: gguf needs {path}; {_WHAT_ELSE}")
        self._values: dict[str, Any] = files.read_json(path)
        self._model = self._values["model"]
        if self._model["type"] != "BPE":
            raise UsageError(f"export.format: gguf: {path} has a model of type {self._model['type']}; {_WHAT_ELSE}")
        self.kind = "llama" if self._model.get("byte_fallback") else "gpt2"
        self.cut = "default" if self.kind == "llama" else self._cut(path)
        last = max((*self._model["vocab"].values(), *(added["id"] for added in self._values["added_tokens"])), default=0)
        if last >= rows:
            raise UsageError(f"export.format: gguf: {path} has a token {last}, the model {rows}; {_WHAT_ELSE}")

    def _cut(self, path: Path) -> str:
        rule = self._values["pre_tokenizer"] or {}
        parts = rule.get("pretokenizers", [rule])
        kinds = [part.get("type") for part in parts]
        if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]:
            return "smollm"
        if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
            return "gpt-2"
        expression = parts[0].get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
        if expression not in _CUTS:
            raise UsageError(f"export.format: gguf: llama.cpp has no name for the pre_tokenizer of {path}; {_WHAT_ELSE}")
        return _CUTS[expression]

    @property
    def prepends(self) -> bool:
        """Whether a text is given a space that it begins with."""
        normalizer, rule = self._values["normalizer"] or {}, self._values["pre_tokenizer"] or {}
        before = any(part["type"] == "Prepend" for part in normalizer.get("normalizers", [normalizer]) if part)
        return before or (rule.get("type") == "Metaspace" and rule.get("prepend_scheme", "always") != "never")

    def tokens(self) -> tuple[list[str], list[int]]:
        """Texts and kinds of all rows; rows that no token has are unused."""
        from gguf import TokenType

        texts = [f"[PAD{row}]" for row in range(self.rows)]
        kinds = [int(TokenType.UNUSED)] * self.rows
        single = {_BYTES.format(byte) for byte in range(256)} if self.kind == "llama" else set()
        for text, row in self._model["vocab"].items():
            texts[row], kinds[row] = text, int(TokenType.BYTE if text in single else TokenType.NORMAL)
        for added in self._values["added_tokens"]:
            row = added["id"]
            texts[row], kinds[row] = added["content"], int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
        if (unknown := self._model["vocab"].get(self._model.get("unk_token"))) is not None:
            kinds[unknown] = int(TokenType.UNKNOWN)
        return texts, kinds

    def scores(self, texts: list[str]) -> list[float]:
        """Of each token how early it is merged: the earlier, the higher. What no merge makes comes last."""
        first: dict[str, int] = {}
        for rank, merge in enumerate(self._model["merges"]):
            first.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), rank)
        return [-float(first.get(text, len(self._model["merges"]))) for text in texts]

    def write(self, writer: Any, tokenizer: Any) -> None:
        """Everything about the tokenizer. writer: `gguf.GGUFWriter`. tokenizer: the folder's, as transformers reads it."""
        from gguf import SpecialVocab

        texts, kinds = self.tokens()
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.cut)
        writer.add_token_list(texts)
        writer.add_token_types(kinds)
        if self.kind == "llama":
            writer.add_token_scores(self.scores(texts))
            writer.add_add_space_prefix(self.prepends)
        special = SpecialVocab(self.folder, load_merges=self.kind == "gpt2", n_vocab=self.rows)
        template = tokenizer.chat_template
        named = [{"name": name, "template": text} for name, text in template.items()] if isinstance(template, dict) else None
        special.chat_template = named or template
        ids = tokenizer("a")["input_ids"]
        special.add_special_token = {"bos": bool(ids) and ids[0] == tokenizer.bos_token_id}
        special.add_to_gguf(writer, quiet=True)
