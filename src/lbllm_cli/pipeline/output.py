"""output.dir: whether everything that lbllm writes there can be written, and nothing that a run reads lies in its way.

A stage or an export that is replaced would take its own source with it.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.files import unwritable, user_path
from lbllm_cli.core.own_folders import check_folders
from lbllm_cli.data.presets import PRESETS
from lbllm_cli.models.model import SourceModel
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.stages import EXPORT, STAGES
from lbllm_cli.recipe.text import Source

_TAILS = ("", ".partial", ".replaced")
# Sampled text is only ever added to, under names that are hashes: reading it there does no harm, but it has to be a folder.
_GENERATED = "generated"
_REPORTS = ("report.html", "report.md")
# The longest path below the output folder.
_LONGEST = f"{max(STAGES, key=len)}.partial/streams/unfinished_quantized_000.bin.tmp"


def _replaced_folders() -> list[str]:
    return [f"{name}{tail}" for name in (*STAGES, EXPORT) for tail in _TAILS]


def output_folder(recipe: Recipe) -> Path:
    """output.dir, in which every name that lbllm writes can be had. Raises UsageError."""
    output = user_path(recipe.output.dir, "output.dir")
    try:
        os.stat(output.absolute() / _LONGEST)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            shown = f"{recipe.output.dir[:80]}..."
            raise UsageError(f"output.dir {shown} is too long for the files in it; give a shorter one") from None
    return output


def check_output(output: Path, model: SourceModel | None) -> None:
    """Whether output.dir can be written, and is not what the model lies in. Raises UsageError."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"output.dir {output} is a file; choose a folder")
    if model is not None and output.exists() and output.resolve() == model.folder.resolve():
        raise UsageError(f"output.dir {output} is the model's own folder; choose another")
    check_places(output)
    if problem := unwritable(output):
        raise UsageError(f"output.dir {output} cannot be written: {problem}, or choose another")


def check_places(output: Path) -> None:
    """Raises UsageError where `output` has a file for one of lbllm's folders, or a folder for one of its files."""
    evaluated = [f"eval/{name}" for name in ("streams", "measured", "lm-eval")]
    results = [f"eval/{name}" for name in ("results.json", "details.json")]
    check_folders(output, [*_replaced_folders(), _GENERATED, "eval", *evaluated], [".lock", *_REPORTS, *results])


def check_overlaps(recipe: Recipe, output: Path, model: Path | None) -> None:
    """Whether nothing that the recipe reads lies where lbllm writes, or around it; links are resolved.

    A folder beside the stages in `output` is in no way; an `output` inside the model's folder is, for whoever copies or
    deletes the one does not think of the other. model: its folder, None where it has none here. Raises UsageError.
    """
    teachers = dict(_teachers(recipe))
    stages = {output / name: "output.dir" for name in (*_replaced_folders(), "eval", *_REPORTS)}
    writes = {written: (_real(written), key) for written, key in stages.items()}
    also = {folder: (_real(folder), key) for key, folder in teachers.items()}
    for key, path in (*_reads(recipe, model), *teachers.items()):
        for place in sorted(_places(path)):
            for written, (resolved, owner) in {**writes, **({} if key in teachers else also)}.items():
                if place.is_relative_to(resolved) or resolved.is_relative_to(place):
                    remedy = f"move it, or choose another {owner}"
                    raise UsageError(f"{key} {path} overlaps with {written}, where lbllm writes; {remedy}")
    for folder, (resolved, key) in also.items():
        if resolved == _real(output):
            raise UsageError(f"{key} {folder} is output.dir; give a folder of its own, for example {output / 'teacher'}")


def _real(path: Path) -> Path:
    """The place behind all links; of a link that leads to itself the link: Path.resolve has an error for that one."""
    return Path(os.path.realpath(path))


def _places(path: Path) -> set[Path]:
    """Where a file or folder lies, and where the links in a folder lead."""
    links = [entry for entry in path.iterdir() if entry.is_symlink()] if path.is_dir() else []
    return {_real(path), *map(_real, links)}


def _teachers(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    for spec, phase in recipe.end_to_end.items():
        if phase.teacher is not None:
            yield f"{spec.section}.teacher", user_path(phase.teacher, f"{spec.section}.teacher")


def _reads(recipe: Recipe, model: Path | None) -> Iterator[tuple[str, Path]]:
    """Files and folders that a recipe names as sources, by key."""
    if model is not None:
        yield "model.path", model
    for key, named in recipe.texts.items():
        for item in named:
            with suppress(UsageError):  # no system has such a path: `data.sources.check` says so
                if name := _local(item):
                    yield f"{key}: source", user_path(name, "source")


def _local(item: Source) -> str | None:
    """The path that a source names, if it names one."""
    if item.path is not None:
        return item.path
    named = item.sampled or item.source.startswith(("builtin:", "hub:")) or item.source in PRESETS
    return None if named else item.source
