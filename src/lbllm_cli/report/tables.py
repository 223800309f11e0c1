"""Tables of a run's report: what was measured, and what each stage took."""

import math
from collections.abc import Sequence
from typing import Any

from lbllm_cli.core.console import GIB, clock
from lbllm_cli.evaluation.sizes import measure_sizes
from lbllm_cli.format.activations import format_of
from lbllm_cli.models.model import SourceModel
from lbllm_cli.recipe.stages import BASE, TABLE
from lbllm_cli.report.distributions import Linear
from lbllm_cli.report.page import Table
from lbllm_cli.report.records import Run, StageRecord

_NONE = "–"
# Of a task's values these are not scores.
_COUNTS = ("samples", "num_fewshot")
_AGREEMENT = (("kl", "KL to base, {}, nats", "{:.3f}"), ("top1", "same likeliest token, {}", "{:.1%}"))
_SIZES = (
    ("bits_per_weight", "bits per weight", "{:.3f}"),
    ("bits_per_parameter", "bits per parameter", "{:.3f}"),
    ("activation_bits", "bits per activation", "{}"),
    ("kv_bits", "bits per key and value entry", "{}"),
    ("bytes", "bytes", "{:,}"),
)


def counted(things: Sequence[Any] | int, noun: str) -> str:
    """(1, "text") -> "1 text", (["a", "b"], "text") -> "2 texts"."""
    count = things if isinstance(things, int) else len(things)
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """checkpoint -> text -> perplexity over the base model's, where both were measured. results: of `eval`."""
    base = results.get(BASE, {}).get("perplexity", {})
    found = {
        name: {text: value / base[text] for text, value in result["perplexity"].items() if text in base}
        for name, result in results.items()
        if name != BASE
    }
    return {name: values for name, values in found.items() if values}


def outcome(run: Run, name: str) -> str | None:
    """A checkpoint in one number; None where it or the base model was not measured."""
    values = [value for value in ratios(run.results).get(name, {}).values() if math.isfinite(value)]
    if not values:
        return None
    mean = math.exp(sum(map(math.log, values)) / len(values))
    return f"{name}: {mean:.2f} times the perplexity of base, geometric mean over {counted(values, 'text')}"


def results_table(results: dict[str, dict[str, Any]]) -> Table:
    """Base and stages side by side. results: of `eval`."""
    over = ratios(results)
    texts = list(dict.fromkeys(text for result in results.values() for text in result["perplexity"]))

    def perplexity(name: str, text: str) -> str:
        found = _form(results[name]["perplexity"].get(text), "{:,.2f}")
        ratio = over.get(name, {}).get(text)
        return found if ratio is None else f"{found} ({ratio:.2f}×)"

    rows = [(f"perplexity, {text}", [perplexity(name, text) for name in results]) for text in texts]
    for key, label, form in _AGREEMENT:
        if any(key in result for result in results.values()):
            rows += [(label.format(text), _cells(results, form, key, text)) for text in texts]
    tasks = {task: scores for result in results.values() for task, scores in result.get("tasks", {}).items()}
    for task, scores in tasks.items():
        rows += _task_rows(results, task, scores)
    rows += [(label, _cells(results, form, key)) for key, label, form in _SIZES]
    return Table(list(results), rows)


def _form(value: Any, form: str) -> str:
    return _NONE if value is None else form.format(value)


def _cells(results: dict[str, dict[str, Any]], form: str, key: str, inner: str | None = None) -> list[str]:
    found = [result.get(key) for result in results.values()]
    return [_form(value if inner is None else (value or {}).get(inner), form) for value in found]


def _task_rows(results: dict[str, dict[str, Any]], task: str, scores: dict[str, float]) -> list[tuple[str, list[str]]]:
    """One row per metric with standard errors, and on how much it was measured. scores: of any checkpoint."""
    metrics = [key for key in scores if key not in _COUNTS and "_stderr" not in key]
    found = [result.get("tasks", {}).get(task, {}) for result in results.values()]

    def score(values: dict[str, float], metric: str) -> str:
        # "exact_match,strict-match" has "exact_match_stderr,strict-match".
        name, *which = metric.split(",")
        error = values.get(",".join((f"{name}_stderr", *which)))
        return _form(values.get(metric), "{:.3f}") + ("" if error is None else f" ± {error:.3f}")

    rows = [(f"{task}, {metric.replace(',', ', ')}", [score(values, metric) for values in found]) for metric in metrics]
    labels = {"samples": f"{task}, samples", "num_fewshot": f"{task}, examples in the prompt"}
    rows += [(label, [_form(values.get(key), "{:,}") for values in found]) for key, label in labels.items() if key in scores]
    return rows


def stages_table(run: Run, model: SourceModel | None) -> Table:
    """What each stage is, and what it took. model: None leaves out what is counted with its shapes."""
    columns = [dict(_stage_facts(record, model)) for record in run.stages.values()]
    rows = [(label, [column[label] for column in columns]) for label in columns[0]]
    return Table(list(run.stages), [(label, cells) for label, cells in rows if set(cells) != {_NONE}])


def _stage_facts(record: StageRecord, model: SourceModel | None) -> list[tuple[str, str]]:
    checkpoint = record.checkpoint
    manifest = {} if checkpoint is None else checkpoint.manifest
    layout = format_of(manifest)
    bits = None if model is None or record.entries is None else measure_sizes(model, record.entries, 0).bits_per_weight
    seconds = [found["seconds"] for found in record.blocks if found.get("seconds") is not None]
    trained = [found["best_epoch"] for found in record.blocks if "best_epoch" in found]
    kl = [f"{found['before']['kl']:.3f} → {found['after']['kl']:.3f}" for found in record.phase]
    return [
        ("state", "complete" if checkpoint is not None else f"unfinished, {counted(record.done, 'block')} done"),
        ("goes on from", (manifest.get("parent") or {}).get("stage", _NONE)),
        ("time, [h:]min:s", _NONE if (taken := record.total("seconds")) is None else clock(taken)),
        ("seconds per block, mean", _form(sum(seconds) / len(seconds) if seconds else None, "{:,.1f}")),
        ("seconds per block, most", _form(max(seconds, default=None), "{:,.1f}")),
        ("seconds that ranks did not wait, each", _busy(record)),
        ("peak RAM, GiB", _gib(record.peak("peak_ram_bytes"))),
        ("peak device memory, GiB", _gib(record.peak("peak_device_bytes"))),
        ("tokens", _form(manifest.get("tokens"), "{:,}")),
        ("group size", _NONE if checkpoint is None else str(checkpoint.record.weights[0])),
        ("bits per weight", _form(bits, "{:.3f}")),
        ("bits per activation", str(layout.bits) if layout else _NONE),
        ("bits per key and value entry", str(layout.kv_bits) if layout else _NONE),
        ("skipped steps", _form(record.total("skipped"), "{:,}")),
        ("KL on held-out sequences, nats", "".join(kl) or _NONE),
        ("blocks returned as they began", str(trained.count(0)) if trained else _NONE),
    ]


def _busy(record: StageRecord) -> str:
    """Of several ranks what each was busy for, in all: one that needs longer than others holds them up."""
    shared = [found["ranks"] for found in (*record.blocks, *record.steps) if found.get("ranks")]
    if not shared or any(len(ranks) != len(shared[0]) for ranks in shared):
        return _NONE
    return ", ".join(f"{sum(rank['busy'] for rank in ranks):,.0f}" for ranks in zip(*shared, strict=True))


def _gib(size: float | None) -> str:
    return _form(None if size is None else size / GIB, "{:.2f}")


def linears_table(linears: list[Linear]) -> Table:
    """Linears by the error that ptq left in their outputs."""
    return Table([f"error of {TABLE[0]}"], [(linear.label, [f"{linear.error:.4f}"]) for linear in linears], "linear")
