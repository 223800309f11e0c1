"""Strict YAML: no duplicate keys, no other keys than text, bounded in depth and size, every refusal with its line."""

import re
from typing import Any

import yaml

from lbllm_cli.core.errors import UsageError, reason

# The deepest key of a recipe lies seven levels down, and a long recipe has a thousand values.
DEPTH = 32
NODES = 10_000


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads 1e-5 as a number, which YAML 1.1 takes for a string."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self._depth = 0
        self._total = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As inherited, for documents of at most DEPTH levels and, aliases unfolded, NODES values."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        alias, line = isinstance(event, yaml.AliasEvent), event.start_mark.line + 1
        if self._depth == DEPTH:
            raise UsageError(f"line {line}: nested more than {DEPTH} levels deep")
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if alias and id(node) not in self._sizes:
            raise UsageError(f"line {line}: the alias *{event.anchor} stands within what it names")
        # What an alias of an alias unfolds to grows as a power: it is counted before anything is made of it.
        size = self._sizes[id(node)] if alias else 1 + sum(self._sizes[id(below)] for below in _children(node))
        self._sizes[id(node)] = size
        self._total += 1
        if max(size, self._total) > NODES:
            raise UsageError(f"line {line}: more than {NODES:,} values, aliases unfolded")
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As inherited; what a tag cannot be made of is an error with its line."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError):  # !!bool 7, !!timestamp '', 0x_, 2020-13-45
            tag = node.tag.removeprefix("tag:yaml.org,2002:")
            raise yaml.constructor.ConstructorError(
                None, None, f"{str(node.value)[:40]!r} is read as {tag} and is none; put quotes around text", node.start_mark
            ) from None


def _children(node: yaml.Node | None) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


class StrictDumper(yaml.SafeDumper):
    """SafeDumper that puts quotes around strings that `parse_yaml` would read as numbers."""


for _tool in (_StrictLoader, StrictDumper):
    _tool.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def _mapping(loader: _StrictLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    if not isinstance(node, yaml.MappingNode):  # !!map 7
        raise ValueError
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag == "tag:yaml.org,2002:merge":
            raise UsageError(f"line {line}: merge keys (<<) are not read; write the keys out")
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise UsageError(f"line {line}: key {str(key)[:80]} is read as {type(key).__name__}; put quotes around it")
        if key in seen:
            raise UsageError(f"line {line}: duplicate key `{key[:80]}`, first on line {seen[key]}; remove one of them")
        seen[key] = line
    return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping)


def outline(text: str, where: str) -> yaml.Node | None:
    """Nodes of YAML that somebody else will read, with tags of his own, of which no object is made here.

    The compiled reader follows brackets by recursion, and ends the process where they are a hundred thousand deep; events come
    without. Raises UsageError naming `where` for what is not YAML, or nested more than DEPTH levels deep.
    """
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH:
                line = event.start_mark.line + 1 if event.start_mark else 0
                raise UsageError(f"{where}: line {line}: nested more than {DEPTH} levels deep")
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
        return node
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is not valid YAML: {reason(error)}") from None


def parse_yaml(text: str, where: str) -> Any:
    """YAML text to plain values.

    Raises UsageError naming `where` and the line when the text is not YAML, repeats a key, or is too deep or too large.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a subclass of SafeLoader
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is not valid YAML: {reason(error)}") from None
