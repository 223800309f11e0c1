"""Draws docs/packages.svg, who imports whom, and docs/data-flow.svg, what a run makes of what, from the code.

    python scripts/draw_architecture.py             write them
    python scripts/draw_architecture.py --check     exit code 1 where they are not what the code says

Nothing is imported but the standard library: the code is read, not run.
"""

import argparse
import ast
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
CODE = ROOT / "src" / "lbllm_cli"
DOCS = ROOT / "docs"

_STYLE = """\
.page { fill: #ffffff } .box { fill: #f2f4f8; stroke: #5a6475 } .stage { fill: #e3ecfa; stroke: #2f5fa8 }
.name { fill: #16191f; font: 600 14px sans-serif } .text { fill: #444c5a; font: 12px sans-serif }
.arrow { fill: none; stroke: #5a6475; stroke-width: 1.4 } .other { stroke-dasharray: 5 4 } .tip { fill: #5a6475 }
@media (prefers-color-scheme: dark) {
.page { fill: #14171c } .box { fill: #222730; stroke: #93a0b5 } .stage { fill: #1c2d4a; stroke: #7da7e8 }
.name { fill: #eef1f6 } .text { fill: #bcc5d3 } .arrow { stroke: #93a0b5 } .tip { fill: #93a0b5 }
}"""
_TIP = (
    '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path class="tip" d="M0 0 8 4 0 8z"/></marker>'
)
_LINE, _NAME, _LETTER = 16, 24, 6.3  # height of a line of text and of a name, width of a letter


@dataclass(frozen=True)
class Box:
    """A box of a drawing; kind: its class in the style."""

    x: float
    y: float
    width: float
    height: float
    name: str
    lines: list[str]
    kind: str = "box"

    @property
    def middle(self) -> float:
        return self.x + self.width / 2

    @property
    def bottom(self) -> float:
        return self.y + self.height


@dataclass
class Drawing:
    """Arrows lie below boxes."""

    width: int
    alt: str
    boxes: list[Box] = field(default_factory=list)
    arrows: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def arrow(self, *points: tuple[float, float], other: bool = False) -> None:
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        self.arrows.append(f'<path class="arrow{" other" * other}" marker-end="url(#tip)" d="{path}"/>')

    def note(self, x: float, y: float, text: str) -> None:
        self.notes.append(f'<text class="text" x="{x:g}" y="{y:g}" text-anchor="middle">{escape(text)}</text>')

    def svg(self, height: float) -> str:
        """The file."""
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {height:g}" width="{self.width}" role="img">',
            f"<title>{escape(self.alt)}</title>",
            f"<style>\n{_STYLE}\n</style>",
            f"<defs>{_TIP}</defs>",
            '<rect class="page" width="100%" height="100%" rx="8"/>',
            *self.arrows,
        ]
        for box in self.boxes:
            size = f'x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}"'
            parts.append(f'<rect class="{box.kind}" rx="6" {size}/>')
            for number, line in enumerate([box.name, *box.lines]):
                place = f'text-anchor="middle" x="{box.middle:g}" y="{box.y + 20 + _LINE * number:g}"'
                parts.append(f'<text class="{"text" if number else "name"}" {place}>{escape(line)}</text>')
        return "\n".join([*parts, *self.notes, "</svg>", ""])


def wrapped(text: str, width: float) -> list[str]:
    """Lines that fit a box."""
    return textwrap.wrap(text, max(8, int((width - 16) / _LETTER)))


# Reading the code


def imported(node: ast.AST) -> Iterator[str]:
    """Names of the modules that a module imports as it runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for otherwise in child.orelse:
                yield from imported(ast.Module([otherwise], []))
            continue
        if isinstance(child, ast.Import):
            yield from (name.name for name in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
            yield from (f"{child.module}.{name.name}" for name in child.names)
        yield from imported(child)


def packages() -> dict[str, set[str]]:
    """Packages, and modules that lie beside them, with those that each imports. `__init__` and `__main__` hold the others."""
    found: dict[str, set[str]] = {}
    names = {path.stem for path in CODE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    names -= {"__init__", "__main__"}
    for path in sorted(CODE.rglob("*.py")):
        package = Path(path.relative_to(CODE).parts[0]).stem
        if package in names:
            parts = [name.split(".") for name in imported(ast.parse(path.read_text(encoding="utf-8")))]
            others = {part[1] for part in parts if part[0] == CODE.name and len(part) > 1} & names
            found.setdefault(package, set()).update(others - {package})
    return found


def first_sentence(text: str) -> str:
    """Of a docstring."""
    sentence = " ".join(text.split("\n\n")[0].replace("`", "").split())
    return sentence.partition(". ")[0].rstrip(".")


def described(package: str) -> str:
    """What a package's docstring says it is."""
    path = CODE / package / "__init__.py"
    tree = ast.parse((path if path.exists() else CODE / f"{package}.py").read_text(encoding="utf-8"))
    return first_sentence(ast.get_docstring(tree) or "")


def table(name: str) -> list[ast.expr]:
    """Entries of a table of `recipe/stages.py`."""
    for node in ast.parse((CODE / "recipe" / "stages.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            value: Any = node.value
            return [value] if isinstance(value, ast.Dict) else list(value.elts)
    raise SystemExit(f"recipe/stages.py has no {name}")


def stages() -> list[dict[str, Any]]:
    """The table of stages: what each entry says in plain values."""
    found = []
    for entry in table("TABLE"):
        assert isinstance(entry, ast.Call)
        said = {"name": ast.literal_eval(entry.args[0]), "parents": (), "phase": "blocks", "fresh": 0}
        for keyword in entry.keywords:
            if keyword.arg != "reads":
                said[str(keyword.arg)] = ast.literal_eval(keyword.value)
        found.append(said)
    return found


def commands() -> dict[str, str]:
    """First sentence of each command's help, without the names of end-to-end phases."""
    (entries,) = table("COMMANDS")
    assert isinstance(entries, ast.Dict)
    pairs = [(key, value) for key, value in zip(entries.keys, entries.values, strict=True) if key and isinstance(value, ast.Call)]
    return {ast.literal_eval(key): first_sentence(ast.literal_eval(value.args[0])) for key, value in pairs}


# Packages


def below(package: str, found: dict[str, set[str]]) -> set[str]:
    """Everything that a package imports, directly or not."""
    return found[package].union(*(below(other, found) for other in found[package]))


def ranks(found: dict[str, set[str]]) -> dict[str, int]:
    """Height of each package above those that it imports; those of stages lie side by side. Raises SystemExit for a circle."""
    height: dict[str, int] = {}
    while len(height) < len(found):
        ready = [name for name in found if name not in height and found[name] <= height.keys()]
        if not ready:
            raise SystemExit(f"packages import each other: {', '.join(sorted(found.keys() - height.keys()))}")
        for name in ready:
            height[name] = 1 + max((height[other] for other in found[name]), default=-1)
    work = {stage["package"] for stage in stages()}
    return {name: max(height[other] for other in work) if name in work else level for name, level in height.items()}


def draw_packages() -> str:
    """Boxes in rows, a package above those that it imports; arrows that follow from others are left out."""
    found, width, gap, margin = packages(), 940, 44, 20
    height = ranks(found)
    direct = {name: others - set().union(*(below(other, found) for other in others)) for name, others in found.items()}
    work = list(dict.fromkeys(stage["package"] for stage in stages()))
    drawing = Drawing(width, "Packages of lbllm_cli, each above those that it imports")
    boxes: dict[str, Box] = {}
    rows: list[list[Box]] = []
    y = float(margin)

    def place(name: str) -> tuple[float, float, str]:
        above = [boxes[other].middle for other in boxes if name in direct[other]]
        number = work.index(name) if name in work else len(work)
        return number, sum(above) / len(above) if above else width / 2, name

    for level in range(max(height.values()), -1, -1):
        names = sorted((name for name in found if height[name] == level), key=place)
        each = min(360.0, (width - 2 * margin - 16 * (len(names) - 1)) / len(names))
        start = (width - each * len(names) - 16 * (len(names) - 1)) / 2
        texts = {name: wrapped(described(name), each) for name in names}
        tall = _NAME + _LINE * max(map(len, texts.values())) + 8
        row = []
        for number, name in enumerate(names):
            kind = "stage" if name in work else "box"
            boxes[name] = Box(start + number * (each + 16), y, each, tall, name, texts[name], kind)
            row.append(boxes[name])
        rows.append(row)
        drawing.boxes += row
        y += tall + gap
    for name in boxes:
        for other in sorted(direct[name]):
            _connect(drawing, rows, boxes[name], boxes[other], gap)
    notes = (
        "An arrow goes from what imports to what is imported; those that follow from others are left out.",
        "Packages of stages are blue: the table of recipe/stages.py names them, and they are loaded by that name.",
    )
    for number, note in enumerate(notes):
        drawing.note(width / 2, y - 12 + 18 * number, note)
    return drawing.svg(y + 24)


def _connect(drawing: Drawing, rows: list[list[Box]], source: Box, target: Box, gap: float) -> None:
    """An arrow of horizontal and vertical pieces, beside the boxes of the rows between."""
    first, last = (next(i for i, row in enumerate(rows) if box in row) for box in (source, target))
    between = [box for row in rows[first + 1 : last] for box in row]
    row = rows[last]
    # Each target has a height of its own in the gap above it: lines to two of them do not run into one.
    share = (row.index(target) + 1) / (len(row) + 1)
    turn = target.y - gap + gap * share
    if not between:
        drawing.arrow((source.middle, source.bottom), (source.middle, turn), (target.middle, turn), (target.middle, target.y))
        return
    sides = [edge for box in between for edge in (box.x - 12, box.x + box.width + 12)]
    spans = [(box.x - 4, box.x + box.width + 4) for box in between]
    free = [x for x in (source.middle, target.middle, *sides) if not any(low < x < high for low, high in spans)]
    lane = min((x for x in free if 8 < x < drawing.width - 8), key=lambda x: abs(x - source.middle))
    leave = source.bottom + gap / 4
    points = [(source.middle, source.bottom), (source.middle, leave), (lane, leave), (lane, turn), (target.middle, turn)]
    drawing.arrow(*points, (target.middle, target.y))


# Stages


def draw_data_flow() -> str:
    """From model and text through the stages to what a run leaves behind."""
    specs, said = stages(), commands()
    drawing = Drawing(940, "Stages of a run: what each reads, goes on from and leaves")
    left, middle, right, gap = (20.0, 190.0), (300.0, 340.0), (730.0, 190.0), 30.0
    model = Box(middle[0], 20, middle[1], 48, "model", ["full precision, as Hugging Face has it"])
    boxes = {"": model}
    y = model.bottom + gap
    for spec in specs:
        last = spec["phase"] == "end-to-end"
        text = described(spec["package"]) if last else said[spec["command"]]
        shared = sum(other["command"] == spec["command"] for other in specs) > 1
        command = f"lbllm {spec['command']}" + (f" --only {spec['phase']}" if shared else "")
        lines = [*wrapped(text, middle[1]), command]
        boxes[spec["name"]] = Box(middle[0], y, middle[1], _NAME + _LINE * len(lines) + 8, spec["name"], lines, "stage")
        reads = wrapped("sequences that no other set holds", left[1]) if spec["fresh"] else []
        note = Box(left[0], y + 6, left[1], _NAME + _LINE * len(reads) + 8, spec["text"], reads)
        drawing.boxes.append(note)
        drawing.arrow((note.x + note.width, note.y + note.height / 2), (middle[0], note.y + note.height / 2))
        y = boxes[spec["name"]].bottom + gap
    drawing.boxes += boxes.values()
    names = [spec["name"] for spec in specs]
    for spec in specs:
        target = boxes[spec["name"]]
        for number, parent in enumerate(spec["parents"] or ("",)):
            source = boxes[parent]
            if names.index(spec["name"]) - (names.index(parent) if parent else -1) == 1:
                drawing.arrow((source.middle, source.bottom), (source.middle, target.y), other=number > 0)
                continue
            # Beside the stages that it passes over.
            lane = middle[0] + middle[1] + 16 * number
            ends = source.y + source.height / 2, target.y + 12 * number
            edge = middle[0] + middle[1]
            drawing.arrow((edge, ends[0]), (lane, ends[0]), (lane, ends[1]), (edge, ends[1]), other=True)
    bus = right[0] - 24
    ends = [box.y + box.height - 14 for box in boxes.values()]
    for box, end in zip(boxes.values(), ends, strict=True):
        drawing.arrows.append(f'<path class="arrow" d="M{box.x + box.width:g} {end:g} L{bus:g} {end:g}"/>')
    drawing.arrows.append(f'<path class="arrow" d="M{bus:g} {ends[0]:g} L{bus:g} {ends[-1]:g}"/>')
    results = {
        "lbllm eval": "model and every stage side by side: eval/results.json",
        "lbllm report": "one page about the run: report.html",
        "lbllm export": "the last stage as a folder that transformers loads: export/",
        "lbllm generate": "text from that folder",
    }
    place = ends[0] + 20
    for number, (name, text) in enumerate(results.items()):
        lines = wrapped(text, right[1])
        box = Box(right[0], place, right[1], _NAME + _LINE * len(lines) + 8, name, lines)
        drawing.boxes.append(box)
        if number < len(results) - 1:
            drawing.arrow((bus, box.y + 18), (right[0], box.y + 18))
        else:
            drawing.arrow((box.middle, box.y - gap), (box.middle, box.y))
        place = box.bottom + gap
    drawing.note(470, y - 8, "Broken lines: what a stage goes on from where the recipe leaves out the stage before it.")
    return drawing.svg(y + 10)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check, stale = parser.parse_args().check, []
    for name, draw in (("packages.svg", draw_packages), ("data-flow.svg", draw_data_flow)):
        path, wanted = DOCS / name, draw()
        if not check:
            path.write_text(wanted, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != wanted:
            stale.append(name)
    if stale:
        print(f"{' and '.join(stale)}: not what the code says; run: python scripts/draw_architecture.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
