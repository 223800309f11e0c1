"""How a drafted recipe is written: the values that were chosen, and beside them why."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from lbllm_cli.core.strict_yaml import StrictDumper, parse_yaml
from lbllm_cli.recipe.stages import COMMANDS

# Text that is drafted with, and its shares: of the web; sampled from the model, which is text as it writes itself; chat.
WEB, OWN, CHAT = "fineweb-edu", "generate:", "ultrachat"
BASE_MIXTURE = {WEB: 3, OWN: 1}
CHAT_MIXTURE = {WEB: 2, OWN: 1, CHAT: 1}
_SOURCE_WORDS = {
    WEB: "web text, random windows of random documents",
    OWN: "sampled from the model itself",
    CHAT: "conversations, with the model's chat template",
}
EVALUATION = ("wikitext2", "c4")
# On SmolLM2-135M and Gemma 3 270M the form that stage 1 loses least with at 2.5 bits: docs/measurements.md.
GROUP_SIZE, LEVEL_BITS = 16, 2


@dataclass(frozen=True)
class Settings:
    """What is chosen for a recipe; the defaults are the most generous values for a GPU.

    path: of the model. output: folder of the run. measured: length of segments of evaluation text; segments: how many of each
    text, None for all.
    mixture: source -> weight, of which `own_text` False leaves out what the model samples. batch: sequences in a forward pass,
    micro: in a pass of training. phases: sequences of each end-to-end phase, 0 for none. processor: the device is a CPU.
    bos: begin sequences and segments with it. family: keys by section, and the model that they were measured on.
    head_bits: of embedding and head in the export.
    """

    path: str
    output: str
    dtype: str
    length: int
    measured: int
    mixture: dict[str, int]
    calibration: int = 128
    training: int = 1024
    segments: int | None = None
    streams: str = "device"
    batch: int = 4
    micro: int = 2
    phases: int = 512
    asymmetric: str = "auto"
    own_text: bool = True
    processor: bool = False
    bos: bool = False
    family: tuple[Mapping[str, Mapping[str, float]], str] = ({}, "")
    head_bits: int = 8


def recipe_text(settings: Settings, reasons: dict[str, str]) -> str:
    """The recipe as YAML, but for what stands above it. reasons: setting -> why it is what it is."""
    parts = _model(settings), _runtime(settings, reasons), _data(settings, reasons), _stages(settings, reasons), _export(settings)
    return "\n".join(["recipe_version: 1", *(line for part in parts for line in part)]) + "\n"


def _model(settings: Settings) -> list[str]:
    why = "float16 has no range for gradients"
    if settings.processor:
        slow = "bfloat16 trains faster on a CPU with avx512_bf16 or amx_bf16 in lscpu"
        fast = "trains faster with this CPU's instructions; `eval` with model.dtype=float32 measures in float32"
        why = slow if settings.dtype == "float32" else fast
    return [
        "model:",
        f"  path: {_scalar(settings.path)}",
        _line(f"  dtype: {settings.dtype}", why),
        "output:",
        f"  dir: {_scalar(settings.output)}",
    ]


def _runtime(settings: Settings, reasons: dict[str, str]) -> list[str]:
    where = {"device": "beside the work on the GPU", "ram": "in RAM", "disk": "on disk, read ahead and written behind"}
    streams = reasons.get("streams", f"hidden states between blocks fit {where[settings.streams]}")
    return [
        "runtime:",
        _line(f"  streams: {settings.streams}", streams),
        _line(f"  batch_size: {settings.batch}", reasons.get("batch", "sequences in one forward pass of a block")),
    ]


def _data(settings: Settings, reasons: dict[str, str]) -> list[str]:
    lines = ["data:"]
    for key, count in (("calibration", settings.calibration), ("training", settings.training)):
        lines += [f"  {key}:", "    source:"]
        lines += [
            _line(f"      - {{source: {_scalar(source)}, weight: {weight}}}", _SOURCE_WORDS[source], 46)
            for source, weight in settings.mixture.items()
            if source != OWN or settings.own_text
        ]
        if not settings.own_text:
            lines.append(f"      # no {OWN} among them: {reasons.get('own_text', 'sampling takes hours on a CPU')}")
        more = "the paper: 8192" if key == "training" else ""
        lines.append(_line(f"    sequences: {count}", reasons.get(key, more)))
        lines.append(_line(f"    length: {settings.length}", reasons.get("length", "")))
        if settings.bos:
            lines.append(_line("    bos: true", "the model is lost on text that does not begin with it"))
    lines.append(_line("  evaluation:", "the beginning of each text: a CPU takes long for all" if settings.segments else ""))
    segments = f", segments: {settings.segments}" if settings.segments else ""
    segments += ", bos: true" if settings.bos else ""
    return [*lines, *(f"    - {{name: {name}, source: {name}, length: {settings.measured}{segments}}}" for name in EVALUATION)]


def _stages(settings: Settings, reasons: dict[str, str]) -> list[str]:
    lines = ["ptq:", _line(f"  group_size: {GROUP_SIZE}", reasons.get("group_size", ""))]
    lines.append(_line(f"  level_bits: {LEVEL_BITS}", "out of a table, a byte for a group; one scale for a row"))
    if settings.asymmetric != "auto":
        lines.append(_line(f"  asymmetric: {settings.asymmetric}", reasons.get("asymmetric", "")))
    lines.append("distill:")
    if settings.processor:
        lines.append(_line("  batch_size: 1", "more steps for the same text"))
    micro = _line(f"  micro_batch_size: {settings.micro}", reasons.get("micro", "sequences in one pass of training"))
    lines += [micro, *_of_family(settings, "distill")]
    lines += _phase(settings, reasons, "text that data.training does not hold")
    lines.append("act_calib:")
    if settings.processor:
        lines.append(_line("  soft: 0", "coarse ratios stay as fitted: to train them gained nothing on a toy"))
    centre = _line("  key_centre: mean", "keys without the mean of their head, which attention does not see")
    lines += [centre, micro, *_of_family(settings, "act_calib")]
    return lines + _phase(settings, reasons, "and text that the phase before it does not hold")


def _export(settings: Settings) -> list[str]:
    if settings.head_bits == 16:
        return []
    return ["export:", _line("  head_bits: 8", "embedding and head: half the bytes; on SmolLM2-135M 0.001 nats")]


def _of_family(settings: Settings, section: str) -> list[str]:
    keys, measured = settings.family
    return [_line(f"  {key}: {value:g}", f"as measured on {measured}") for key, value in keys.get(section, {}).items()]


def _phase(settings: Settings, reasons: dict[str, str], text: str) -> list[str]:
    if not settings.phases:
        return [f"  # no end_to_end: {reasons.get('phases', 'it trains the whole model at once, which takes a CPU long')}"]
    return ["  end_to_end:", _line(f"    sequences: {settings.phases}", reasons.get("phases", text))]


def _line(text: str, comment: str, column: int = 30) -> str:
    """A line of YAML and a comment behind it, in a column where the value leaves room."""
    return f"{text:<{column - 1}} # {comment}" if comment else text


def _scalar(text: str) -> str:
    """Text as YAML has it, in quotes where they are needed."""
    plain = re.fullmatch(r"[\w./][\w./-]*", text) and parse_yaml(text, "") == text
    return text if plain else yaml.dump(text, Dumper=StrictDumper, default_style='"', allow_unicode=True, width=10**6).strip()


def model_name(model: str) -> str:
    """The last part of a model's path or id: "meta-llama/Llama-3.1-8B" -> "Llama-3.1-8B"; of "." that of the folder."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model.rpartition("/")[2]


def default_name(model: str) -> str:
    """Of a model's recipe: "meta-llama/Llama-3.1-8B" -> "llama-3.1-8b.yaml"."""
    return (re.sub(r"[^a-z0-9._-]+", "-", model_name(model).lower()).strip("-.") or "model") + ".yaml"


def run_lines(target: str) -> list[str]:
    """The commands of a whole run."""
    names = ("validate", *COMMANDS, "eval", "report", "export")
    return [f"lbllm {name:<9} --recipe {shlex.quote(target)}" for name in names]


def header_text(titles: list[str], target: str, output: str, needs: list[str]) -> str:
    """What stands above a recipe, as comments. titles: what it is and where it comes from. needs: forecasts in words.

    target: the recipe's file. output: of the run, as the recipe has it.
    """
    first, *others = run_lines(target)
    other = shlex.quote(f"output.dir={_scalar(f'{output}-builtin')}")
    tries = f"lbllm ptq --recipe {shlex.quote(target)} data.calibration.source=builtin:calibration {other}"
    lines = [*titles, "", f"Run:    {first}     (check everything, forecast memory, disk and time)"]
    lines += [*(f"        {line}" for line in others), f"Try:    {tries}"]
    lines += [f"{'Needs:' if place == 0 else '':<8}{line}" for place, line in enumerate(needs)]
    # A path may have lines of its own.
    return "".join(f"# {part}".rstrip() + "\n" for line in lines for part in line.splitlines() or [""])
