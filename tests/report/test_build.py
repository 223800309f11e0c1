"""`lbllm report`: everything that is known, on a page that needs nothing else and takes nothing of a run for markup."""

import json
import os
import re
import shutil

import pytest
import torch
from conftest import save_toy, write_recipe
from pages import Checked, live_html
from typer.testing import CliRunner

from lbllm_cli.cli.app import app
from lbllm_cli.format.activations import format_of
from lbllm_cli.models.stored import decoded, stored_block
from lbllm_cli.pipeline.checkpoint import Checkpoint
from lbllm_cli.pipeline.plan import prepare
from lbllm_cli.recipe.load import load_recipe
from lbllm_cli.report import figures as plots
from lbllm_cli.report.distributions import Linear, input_histograms, weight_histogram, worst_linears
from lbllm_cli.runtime.attachments import attach
from lbllm_cli.runtime.quantizer import read_quantizers
from lbllm_cli.training.log_records import read_records


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a model of two blocks, a recipe, and a run of all three stages and eval."""
    folder = tmp_path_factory.mktemp("finished")
    model = save_toy(folder / "model", num_hidden_layers=2)
    short = {"epochs": 1, "batch_size": 4}
    quick = {"bits": 3, "kv_form": "uniform"}  # the search for tables takes seconds otherwise
    recipe = write_recipe(folder / "recipe.yaml", model, folder / "run", distill=short, act_calib={**short, **quick})
    for stage in ("ptq", "distill", "act-calib", "eval"):
        result = CliRunner().invoke(app, [stage, "--recipe", str(recipe)], catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture
def ptq_alone(finished, tmp_path):
    """ptq_alone(output, model): a recipe whose output folder holds the ptq stage of the finished run."""

    def recipe(output=tmp_path / "run", model=finished / "model"):
        shutil.copytree(finished / "run" / "ptq", output / "ptq")
        return write_recipe(tmp_path / "recipe.yaml", model, output)

    return recipe


@pytest.fixture
def undrawn(monkeypatch):
    """Images are empty: most of a report's time is drawing."""
    empty = "data:image/svg+xml;base64,"
    monkeypatch.setattr(plots, "draw", lambda alt, paint, height=0: plots.Image(alt, empty, empty))


def numbers(results):
    """Every number of results.json as a reader sees it."""
    for result in results.values():
        yield from (f"{value:,.2f}" for value in result["perplexity"].values())
        yield from (f"{value:.3f}" for value in result.get("kl", {}).values())
        yield from (f"{value:.1%}" for value in result.get("top1", {}).values())
        yield from (f"{result[key]:.3f}" for key in ("bits_per_weight", "bits_per_parameter"))
        yield f"{result['bytes']:,}"
        yield from (str(result[key]) for key in ("activation_bits", "kv_bits"))
        for scores in result.get("tasks", {}).values():
            yield f"{scores['acc']:.3f} ± {scores['acc_stderr']:.3f}"
            yield f"{scores['samples']:,}"


def cells(markdown):
    """Words of the cells of a Markdown report's tables."""
    return {word for line in markdown.splitlines() if line.startswith("| ") for word in re.split(r"[|\s]+", line)}


def test_a_whole_run(ok, finished):
    folder = finished / "run"
    results = json.loads((folder / "eval" / "results.json").read_text())
    for name, accuracy in zip(results, (0.61, 0.42, 0.53, 0.34), strict=True):
        results[name]["tasks"] = {"riddles": {"acc": accuracy, "acc_stderr": 0.0917, "samples": 1234, "num_fewshot": 5}}
    (folder / "eval" / "results.json").write_text(json.dumps(results))
    ok("report", "--recipe", finished / "recipe.yaml")
    text, markdown = ((folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    page = Checked(text)
    assert len(text) < 3_000_000
    assert not page.all("script")
    assert not page.all("link")
    for _, attributes, _ in page.elements:
        for key in attributes.keys() & {"src", "href", "srcset"}:
            assert attributes[key].startswith("data:image/svg+xml;base64,")
    assert "@import" not in text
    assert "url(" not in text
    for number in numbers(results):
        assert number in page.text
        assert set(number.split()) <= cells(markdown)
    assert f"({results['ptq']['perplexity']['novels'] / results['base']['perplexity']['novels']:.2f}×)" in page.text
    # Ratios, depth, positions of one text, error and loss of two stages, four linears and their distinct inputs.
    images = page.all("img")
    assert len(images) in range(1 + 1 + 1 + 2 * 2 + 4 + 1, 1 + 1 + 1 + 2 * 2 + 4 + 4 + 1)
    assert len(page.all("source")) == len(images)
    assert all(len(image["alt"]) > 20 for image in images)
    figures = page.all("figure")
    assert len(figures) == 6
    assert len([stack for tag, _, stack in page.elements if tag == "figcaption" and stack[-1] == "figure"]) == len(figures)
    assert all(len(caption) > 80 for caption in re.findall("<figcaption>(.*?)</figcaption>", text, re.DOTALL))
    assert page.all("details")
    assert "group_size: 32" in page.text
    assert '"threads": 1' in page.text
    assert '"threads": 1' in markdown


def test_ptq_alone_names_what_is_missing_and_equal_runs_give_equal_bytes(ok, tmp_path, ptq_alone):
    recipe, written = ptq_alone(), []
    for _ in range(2):
        ok("report", "--recipe", recipe)
        written.append([(tmp_path / "run" / f"report.{kind}").read_bytes() for kind in ("html", "md")])
    assert written[0] == written[1]
    text, markdown = (content.decode() for content in written[0])
    page = Checked(text)
    for shown in (page.text, markdown):
        for command in ("distill", "act-calib", "eval"):
            assert f"lbllm {command} --recipe" in shown
        assert "lbllm ptq --recipe" not in shown
    assert "Nothing is measured yet. Run `lbllm eval --recipe ...`." in markdown
    assert len(page.all("img")) == 4


def test_an_unfinished_stage_is_still_a_report(ok, tmp_path, ptq_alone):
    recipe, run = ptq_alone(), tmp_path / "run"
    (run / "ptq").rename(run / "ptq.partial")
    (run / "ptq.partial" / "lbllm_stage.json").rename(run / "ptq.partial" / "progress.json")
    with (run / "ptq.partial" / "events.jsonl").open("a") as handle:
        handle.write('{"stage": "ptq", "blo')
    ok("report", "--recipe", recipe)
    page = Checked((run / "report.html").read_text(encoding="utf-8"))
    assert "unfinished, 2 blocks done" in page.text
    assert "lbllm ptq --recipe ... goes on" in page.text
    assert not page.all("img")


def test_a_run_without_its_model_says_why_weights_are_not_drawn(ok, tmp_path, ptq_alone):
    ok("report", "--recipe", ptq_alone(model=tmp_path / "gone"))
    page = Checked((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert "not drawn" in page.text
    assert str(tmp_path / "gone") in page.text
    assert not page.all("img")


def test_what_ranks_were_busy_for_is_told_and_damaged_records_are_not(ok, tmp_path, ptq_alone, undrawn):
    """One of three waits for the others: whoever holds them up is seen."""
    recipe = ptq_alone()
    log = tmp_path / "run" / "ptq" / "events.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    busy = ((3.2, 9.9, 3.1), (2.9, 8.2, 3.0))
    for line, each in zip(lines, busy, strict=True):
        line["ranks"] = [{"busy": seconds, "bytes": {"reduce": 7}} for seconds in each]
    log.write_text("\n".join(map(json.dumps, lines)))
    ok("report", "--recipe", recipe)
    assert "| seconds that ranks did not wait, each | 6, 18, 6 |" in (tmp_path / "run" / "report.md").read_text()
    lines[0]["ranks"] = [{"busy": "long"}]
    log.write_text("\n".join(map(json.dumps, lines)))
    ok("report", "--recipe", recipe)
    assert "did not wait, each | 3, 8, 3 |" in (tmp_path / "run" / "report.md").read_text()


def test_nothing_to_report_is_usage(lbllm, tmp_path, recipe):
    result = lbllm("report", "--recipe", recipe)
    assert result.exit_code == 2
    assert "run: lbllm ptq --recipe" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_refused_with_what_mends_it(lbllm, tmp_path, recipe, monkeypatch):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "run"
    result = lbllm("report", "--recipe", recipe, f"output.dir={place}")
    assert result.exit_code == 2
    why = f"cannot be written: {tmp_path / 'file'} is no folder; move it away, or choose another"
    assert result.stderr == f"lbllm: output.dir {place} {why}\n"
    (tmp_path / "run").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    result = lbllm("report", "--recipe", recipe)
    assert result.exit_code == 2
    why = f"cannot be written: {tmp_path / 'run'} is not a writable folder; let this user write there, or choose another"
    assert result.stderr == f"lbllm: output.dir {tmp_path / 'run'} {why}\n"


def test_a_stage_made_again_after_eval_is_remarked(ok, tmp_path, recipe, undrawn):
    run = tmp_path / "run"
    ok("ptq", "--recipe", recipe, "ptq.rounds=0")
    ok("eval", "--recipe", recipe)
    ok("ptq", "--recipe", recipe, "ptq.rounds=0")  # up to date, which renews the manifest's time
    ok("report", "--recipe", recipe)
    remark = "numbers of ptq are older than the ptq"
    assert remark not in (run / "report.html").read_text(encoding="utf-8")
    ok("ptq", "--recipe", recipe, "ptq.levels=quantile", "ptq.rounds=0", "--force")
    ok("report", "--recipe", recipe)
    assert all(remark in (run / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))


def test_a_models_name_is_not_live_in_its_card(ok, tmp_path):
    name = "a`b` _c_ [d](http:x) <script>1<"
    recipe = write_recipe(tmp_path / "recipe.yaml", save_toy(tmp_path / name), tmp_path / "run")
    ok("ptq", "--recipe", recipe, "ptq.rounds=0")
    ok("export", "--recipe", recipe)
    card = (tmp_path / "run" / "export" / "README.md").read_text(encoding="utf-8")
    assert not live_html(card)
    from markdown_it import MarkdownIt

    _, front, text = card.split("---\n", 2)
    assert "scrip" not in front
    heading = MarkdownIt("commonmark").render(text).splitlines()[0]
    assert "a`b` _c_ [d](http:x) &lt;script&gt;1&lt;" in heading
    assert "<a " not in heading


def test_a_path_with_markup_is_escaped(ok, tmp_path, ptq_alone, undrawn):
    ok("report", "--recipe", ptq_alone(tmp_path / "a<b>c"))
    page = Checked((tmp_path / "a<b>c" / "report.html").read_text(encoding="utf-8"))
    assert not page.all("b")
    assert "a<b>c" in page.text


def test_blocks_without_error_have_no_decibels():
    image = plots.signal_to_noise({"ptq": [[None, float("inf"), 12.5], [None, 20.0, 11.5]], "distill": [[None] * 3]})
    assert "ptq" in image.alt


def test_perplexities_that_are_all_infinite_are_no_error():
    ranges = [{"first": first, "last": last, "perplexity": float("inf")} for first, last in ((1, 1), (2, 3), (4, 7))]
    assert plots.perplexity_by_position("novels", {"ptq": ranges}).light


def test_last_record_of_a_block_counts_and_torn_lines_do_not(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"block": 1, "seconds": 1}\n{"block": 0}\n{"block": 1, "seconds": 2}\n{"blo\n[]\n')
    assert read_records(tmp_path / "events.jsonl", "block") == [{"block": 0}, {"block": 1, "seconds": 2}]
    assert read_records(tmp_path / "none.jsonl", "block") == []


@pytest.fixture
def calibrated(finished):
    """The model of the finished run, and its last checkpoint."""
    plan = prepare(load_recipe(finished / "recipe.yaml", []))
    return plan.model, Checkpoint(finished / "run", "act-calib")


@torch.no_grad()
def test_histograms_of_weights_have_their_shares_and_unit(finished, calibrated):
    worst = worst_linears(read_records(finished / "run" / "ptq" / "events.jsonl", "block"), 4)
    assert [linear.error for linear in worst] == sorted((linear.error for linear in worst), reverse=True)
    found = weight_histogram(*calibrated, worst[0])
    width = float(found.edges[1] - found.edges[0])
    middles = (found.edges[1:] + found.edges[:-1]) / 2
    for density in (found.source, found.decoded):
        assert float(density.sum()) * width == pytest.approx(1, abs=0.02)
    assert float((found.source * middles**2).sum()) * width == pytest.approx(1, abs=0.05)
    assert 0.5 < float((found.decoded * middles**2).sum()) * width < 1.2


@torch.no_grad()
def test_histograms_of_inputs_are_of_what_the_quantizers_see(calibrated):
    model, checkpoint = calibrated
    tokens = torch.arange(24)[None] + 40
    linears = [Linear(1, "self_attn.v_proj", 0.1), Linear(0, "mlp.down_proj", 0.2), Linear(1, "self_attn.q_proj", 0.05)]
    seen = list(input_histograms(model, checkpoint, tokens, linears))
    first = "self_attn.q_proj.input"
    assert [(histogram.block, histogram.name) for histogram in seen] == [(0, "mlp.down_proj.input"), (1, first)]
    # By hand: the last block's norm on the stream behind the block before it, through the quantizer.
    layout = format_of(checkpoint.manifest)
    hidden = stored_block(model, 0, checkpoint.read_block(0), layout)(model.embed()(tokens))
    stored = checkpoint.read_block(1)
    block = stored_block(model, 1, stored, layout)
    quantizer = read_quantizers(block.layer, block.units, stored, block.prefix, layout)[first]
    given = quantizer(block.layer.input_layernorm(hidden))
    assert sum(table.share for table in seen[1].tables) == pytest.approx(1)
    for table in seen[1].tables:
        assert float(table.codes.sum()) == pytest.approx(1)
        width = float(table.edges[1] - table.edges[0])
        assert 0.95 < float(table.density.sum()) * width <= 1 + 1e-9
        assert int((table.density > 0).sum()) > 3 * len(table.levels)  # the values before they are quantized
    zeros = sum(table.share * float(table.codes[table.levels.tolist().index(0)]) for table in seen[1].tables)
    assert zeros == pytest.approx(float((given == 0).double().mean()), abs=1e-9)


@pytest.fixture
def mixture(ok, tmp_path, given_tables):
    """A recipe of a run of a mixture of experts, whose activations are quantized."""
    model = save_toy(tmp_path / "experts", "qwen3-moe", num_hidden_layers=1)
    sections = {"ptq": {"rounds": 0}, "act_calib": {"parent": "ptq", "epochs": 0}}
    recipe = write_recipe(tmp_path / "recipe.yaml", model, tmp_path / "run", **sections)
    for stage in ("ptq", "act-calib"):
        ok(stage, "--recipe", recipe)
    return recipe


@torch.no_grad()
def test_what_experts_read_is_that_of_all_of_them(ok, tmp_path, mixture, undrawn, monkeypatch):
    # The linears with the largest errors are others from processor to processor.
    linears = [Linear(0, f"mlp.experts.{number}.{name}_proj", 0.1) for number, name in ((1, "down"), (2, "down"), (0, "up"))]
    monkeypatch.setattr("lbllm_cli.report.build.worst_linears", lambda records, count: linears)
    ok("report", "--recipe", mixture)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    names = [f"mlp.experts.{name}_proj_input" for name in ("down", "gate")]
    assert all(page.count(f"Distribution of block 0, {name} in steps") == 1 for name in names)
    model, checkpoint = prepare(load_recipe(mixture, [])).model, Checkpoint(tmp_path / "run", "act-calib")
    tokens = torch.arange(24)[None] + 40
    seen = {histogram.name: histogram for histogram in input_histograms(model, checkpoint, tokens, linears)}
    assert list(seen) == names
    # By hand: what the quantizers themselves are given in a pass.
    stored = checkpoint.read_block(0)
    block = model.block(0, decoded(stored, model))
    quantizers = read_quantizers(block.layer, block.units, stored, block.prefix, checkpoint.activations)
    attach(block.layer, block.units, quantizers)
    given = {name: [] for name in names}
    for name in names:
        quantizers[name].register_forward_hook(lambda _, inputs, output, name=name: given[name].append(output.flatten()))
    block(model.embed()(tokens))
    # Gate and up of one expert read the same, and ask one after the other.
    given["mlp.experts.gate_proj_input"] = given["mlp.experts.gate_proj_input"][::2]
    for name, histogram in seen.items():
        assert len(given[name]) > 1
        zeros = sum(table.share * float(table.codes[table.levels.tolist().index(0)]) for table in histogram.tables)
        assert zeros == pytest.approx(float((torch.cat(given[name]) == 0).double().mean()), abs=1e-9)


DAMAGED = [
    "[]", "7", '{"base": 1}', '{"base": {}}', '{"other": {"perplexity": {}}}', '{"base": {"perplexity": {"$\\\\frac$": 9.0}}}',
    '{"base": {"perplexity": {"novels": "9"}}}', '{"base": {"perplexity": {"novels": 0}}}', "[" * 9999, "\xff", '{"ptq": null}',
    '{"base": {"perplexity": {"novels": 9.0}, "tasks": {"t": {"acc": "x"}}}}',
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_results_are_named_with_the_command(lbllm, tmp_path, ptq_alone, text):
    recipe, file = ptq_alone(), tmp_path / "run" / "eval" / "results.json"
    file.parent.mkdir()
    file.write_bytes(text.encode("latin-1"))
    result = lbllm("report", "--recipe", recipe)
    assert result.exit_code == 2
    assert f"{file} is damaged; run: lbllm eval --recipe ..." in result.stderr


@pytest.mark.parametrize(("source", "why"), [("fineweb-edu", "fineweb-edu"), ("builtin:evaluation/novel", "no such bundled")])
def test_evaluation_text_that_is_none_leaves_the_report(ok, tmp_path, finished, undrawn, source, why):
    shutil.copytree(finished / "run", tmp_path / "run")
    recipe = write_recipe(tmp_path / "recipe.yaml", finished / "model", tmp_path / "run")
    ok("report", "--recipe", recipe, f"data.evaluation=[{{name: web, source: '{source}', length: 64}}]")
    page = (tmp_path / "run" / "report.md").read_text(encoding="utf-8").replace("\\", "")
    assert "Not drawn: " in page
    assert why in page.partition("Not drawn: ")[2].splitlines()[0]


@pytest.mark.parametrize("name", ["lbllm_stage.json", "block_001.safetensors"])
@pytest.mark.parametrize("gone", [True, False])
def test_a_stage_that_cannot_be_read_is_named_beside_the_others(ok, lbllm, tmp_path, finished, undrawn, name, gone):
    run = tmp_path / "run"
    for stage in ("ptq", "distill"):
        shutil.copytree(finished / "run" / stage, run / stage)
    recipe, file = write_recipe(tmp_path / "recipe.yaml", finished / "model", run), run / "distill" / name
    if gone:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:100])
    shown = ok("report", "--recipe", recipe).stderr
    page = (run / "report.md").read_text(encoding="utf-8")
    assert "| state | complete |" in page
    assert "download" not in shown + page
    if name == "lbllm_stage.json" and gone:  # there is no such stage
        assert "distill is not there" in page
        return
    assert f"report: warning: {file} is " in shown
    assert "run: lbllm distill --recipe ... --force" in shown
    assert f"distill: {file} is " in page.replace("\\", "")
    assert "distill is not there" not in page
    # What is left of it is no run by itself.
    if name == "lbllm_stage.json":
        shutil.rmtree(run / "ptq")
        result = lbllm("report", "--recipe", recipe)
        assert result.exit_code == 2
        assert f"{file} is damaged; run: lbllm distill --recipe ... --force" in result.stderr


def test_an_export_that_cannot_be_read_leaves_the_report(ok, tmp_path, undrawn):
    recipe = write_recipe(tmp_path / "r.yaml", save_toy(tmp_path / "toy"), tmp_path / "run", ptq={"rounds": 0})
    for command in ("ptq", "export"):
        ok(command, "--recipe", recipe)
    ok("eval", "--recipe", recipe, "eval.checkpoints=[base, export]")
    record = tmp_path / "run" / "export" / "lbllm_export.json"
    record.write_text("{")
    shown = ok("report", "--recipe", recipe).stderr
    assert f"report: warning: {record}" in shown
    page = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "export: " in page
    assert "numbers of export are older" not in page  # nobody knows


LINES = [
    "[]", "7", "null", '{"block": "0"}', '{"block": [0]}', '{"block": {}}', '{"block": -1}', '{"block": 99}', '{"block": 1e400}',
    '{"block": 0, "seconds": "x"}', '{"block": 0, "seconds": NaN}', '{"block": 0, "before": {}}', '{"block": 0, "epochs": 7}',
    '{"block": 0, "linears": {"x": {"error": 1}}}', '{"block": 0, "linears": [1]}', '{"block": 0, "peak_ram_bytes": 1e300}',
    '{"step": 0}',
    '{"step": 0, "tokens": 1, "loss": "x"}', '{"phase": 1}', '{"phase": "x", "before": {"kl": 1}}', "[" * 9999, "\xff",
]  # fmt: skip


def test_damaged_lines_of_a_log_do_not_stop_a_report(ok, tmp_path, ptq_alone, undrawn):
    recipe = ptq_alone()
    ok("report", "--recipe", recipe)
    before = (tmp_path / "run" / "report.md").read_bytes()
    with (tmp_path / "run" / "ptq" / "events.jsonl").open("ab") as handle:
        handle.write("\n".join(LINES).encode("latin-1"))
    ok("report", "--recipe", recipe)
    assert (tmp_path / "run" / "report.md").read_bytes() == before


@pytest.mark.parametrize("name", ["events.jsonl", "environment.json", "recipe.resolved.yaml"])
def test_what_is_no_file_or_no_text_is_left_out_of_a_report(ok, tmp_path, ptq_alone, undrawn, name):
    recipe, file = ptq_alone(), tmp_path / "run" / "ptq" / name
    file.write_bytes(b"\xff\xfe" * 100)
    page = tmp_path / "run" / "report.md"
    for spoil in (lambda: None, lambda: (file.unlink(), file.mkdir())):
        spoil()
        page.unlink(missing_ok=True)
        ok("report", "--recipe", recipe)
        text = page.read_text(encoding="utf-8")
        assert "| ptq |" in text
        assert "\ufffd" not in text
