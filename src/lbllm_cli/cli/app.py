"""The command line: load recipe -> stage -> exit code. torch is imported only inside commands, `--help` answers at once."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from lbllm_cli.cli.ending import exit_codes, run, run_ranks
from lbllm_cli.parallel.launch import refuse_ranks
from lbllm_cli.recipe.stages import COMMANDS, TABLE, Phase

app = typer.Typer(
    name="lbllm",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Binarize a large language model to two bits per weight, W(1+1), from one GPU.\n\n"
    "The commands of a run read one YAML recipe; each stage writes a checkpoint that the next picks up.",
    epilog="Example: `lbllm ptq --recipe llama2-7b.yaml`, then `lbllm eval --recipe llama2-7b.yaml`",
)

_RECIPE = typer.Option("--recipe", "-r", help="YAML recipe, or the name of one that comes with lbllm", show_default=False)
RecipeOption = Annotated[Path, _RECIPE]
OptionalRecipe = Annotated[Path | None, _RECIPE]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="override recipe keys", show_default=False)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check everything, print the plan, write nothing")]
Only = Annotated[Phase | None, typer.Option("--only", help="one of the two phases", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="make it again, whatever it was made from; it is replaced at the end")]
EngineOption = Annotated[
    Literal["auto", "native", "transformers"],
    typer.Option("--engine", help="auto: on a CPU the native engine where it knows the export, which needs no torch"),
]
Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="default: one for each core, or OMP_NUM_THREADS", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="result as JSON on stdout")]


def _version(wanted: bool) -> None:
    if wanted:
        from lbllm_cli import __version__

        typer.echo(f"lbllm {__version__}")
        raise typer.Exit


def _set_library_environment() -> None:
    """Settings that libraries read once, at their import."""
    # stderr is for one line per block.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # Threads that spin for long while they wait starve each other on a busy machine: a toy's block took 33 s on two busy
    # cores, 2.4 s without spinning. Not spinning at all costs an idle machine a third; a short spin costs neither much.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False,
) -> None:
    _set_library_environment()
    if context.invoked_subcommand not in (*COMMANDS, "eval"):
        with exit_codes():
            refuse_ranks(f"lbllm {context.invoked_subcommand}")


def _stage_command(command: str) -> Callable[..., None]:
    """The function of a command that runs stages; `--only` where there are two phases."""

    def one(recipe: RecipeOption, overrides: Overrides = None, dry_run: DryRun = False, force: Force = False) -> None:
        several(recipe, overrides, dry_run, force)

    def several(
        recipe: RecipeOption, overrides: Overrides = None, dry_run: DryRun = False, force: Force = False, only: Only = None
    ) -> None:
        from lbllm_cli.pipeline.runner import run_command

        run_ranks(run_command, recipe, overrides, command=command, dry_run=dry_run, force=force, only=only)

    return several if any(spec.command == command and spec.end_to_end for spec in TABLE) else one


for _name, _command in COMMANDS.items():
    _example = f"Example: `lbllm {_name} --recipe llama3.1-8b {_command.example}`"
    app.command(_name, help=_command.text, epilog=_example)(_stage_command(_name))


@app.command(epilog="Example: `lbllm init Qwen/Qwen3-8B -o qwen3-8b.yaml`, then `lbllm validate --recipe qwen3-8b.yaml`")
def init(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="model folder, or a Hugging Face id", show_default=False)],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="the recipe's file, - for stdout; default <model's name>.yaml, here")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace a recipe that is there")] = False,
) -> None:
    """Write a recipe for a model that fits this machine: its GPU or CPU, memory and disk as they are free now.

    Only the model's configuration and tokenizer are read. Every value that was chosen has its reason beside it.
    """
    with exit_codes():
        from lbllm_cli.cli.init import init as write

        write(model, output, force)


@app.command("eval", epilog="Example: `lbllm eval --recipe llama3.1-8b 'eval.tasks=[builtin:continuation]' --json`")
def evaluate(
    recipe: RecipeOption,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    force: Annotated[bool, typer.Option("--force", help="measure again what is known")] = False,
    json: Json = False,
) -> None:
    """Measure the base model and every complete stage, side by side: perplexity, agreement, lm-eval tasks, size.

    What was measured before is not measured again: a stage, a text or a task that is added costs only itself.
    """
    from lbllm_cli.cli.evaluate import evaluate as measure

    run_ranks(measure, recipe, overrides, dry_run=dry_run, as_json=json, force=force)


@app.command(epilog="Example: `lbllm report --recipe llama3.1-8b`")
def report(recipe: RecipeOption, overrides: Overrides = None) -> None:
    """Write <output.dir>/report.html and report.md: results, stages, training and distributions, from what the run has left.

    Whatever is not there yet is named with the command that makes it.
    """
    from lbllm_cli.report.build import report as build

    run(build, recipe, overrides)


@app.command(
    epilog="Example: `lbllm export --recipe llama3.1-8b export.format=gguf`, or "
    "`lbllm export --recipe llama3.1-8b --push my-name/Llama-3.1-8B-W2A4 --private`"
)
def export(
    recipe: RecipeOption,
    overrides: Overrides = None,
    push: Annotated[
        str | None, typer.Option("--push", metavar="ORG/NAME", help="upload it to the Hugging Face Hub", show_default=False)
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="a repository that --push makes is private")] = False,
    dry_run: DryRun = False,
    force: Annotated[
        bool, typer.Option("--force", help="write it again where it is up to date; one of other inputs is replaced without this")
    ] = False,
) -> None:
    """Write a model folder to <output.dir>/export/, packed or in a format that other programs read."""
    from lbllm_cli.cli.export import export as write

    run(write, recipe, overrides, repository=push, private=private, dry_run=dry_run, force=force)


@app.command(epilog='Example: `lbllm generate --model runs/smollm2-135m/export --prompt "What is a comet?"`')
def generate(
    model: Annotated[
        str, typer.Option("--model", "-m", help="exported folder, any model folder, or a Hugging Face id", show_default=False)
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="user message, or the beginning of a text", show_default=False)],
    raw: Annotated[bool, typer.Option("--raw", help="continue the prompt as it is, without the chat template")] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=2**31, help="tokens to write at most; default 128, or as many as fit", show_default=False),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0: always the likeliest token")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="for temperatures above 0")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    engine: EngineOption = "auto",
    threads: Threads = None,
    full_activations: Annotated[
        bool, typer.Option("--full-activations", help="do not quantize activations, keys and values")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run Python code that comes with the model; read it first")
    ] = False,
) -> None:
    """Stream text from a model folder to stdout; the chat template is applied where there is one."""
    # More than six parameters: each is an option.
    with exit_codes():
        from lbllm_cli.cli.generate import generate as stream
        from lbllm_cli.models.prompts import Request

        wanted = Request(prompt, raw, max_new_tokens, temperature, seed, full_activations, trust_remote_code)
        stream(model, device, engine, threads, wanted)


@app.command(epilog="Example: `lbllm chat --model runs/smollm2-135m/export`")
def chat(
    model: Annotated[
        str, typer.Option("--model", "-m", help="exported folder, any model folder, or a Hugging Face id", show_default=False)
    ],
    system: Annotated[str | None, typer.Option(help="system message to begin with", show_default=False)] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0: always the likeliest token")] = 0.7,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="for temperatures above 0")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=2**31, help="tokens of an answer at most")] = 512,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    engine: EngineOption = "auto",
    threads: Threads = None,
) -> None:
    """Talk with a model in the terminal."""
    # More than six parameters: each is an option.
    with exit_codes():
        from lbllm_cli.cli.chat import Wishes
        from lbllm_cli.cli.chat import chat as talk

        talk(model, Wishes(system, temperature, seed, max_new_tokens, device, engine, threads))


@app.command(
    epilog="Example: `lbllm serve --model runs/smollm2-135m/export --port 8080`, or "
    "`lbllm serve -m runs/smollm2-135m/export --engine vllm -- --max-model-len 4096`",
    context_settings={"allow_extra_args": True},
)
def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Option("--model", "-m", help="exported folder, any model folder, or a Hugging Face id", show_default=False)
    ],
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0: on all")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")] = 8000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; vLLM takes the one that it is built for")] = "auto",
    engine: Annotated[
        Literal["auto", "vllm", "transformers"],
        typer.Option(help="auto: vLLM where it is installed, but transformers for packed GPT-OSS, and where --device is given"),
    ] = "auto",
    full_activations: Annotated[
        bool, typer.Option("--full-activations", help="run activations, keys and values in full precision")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run Python code that comes with the model; read it first")
    ] = False,
) -> None:
    """Serve a model to OpenAI clients: chat and plain completions, streamed or whole. Needs vLLM, or the extra `serve`.

    What follows -- goes to vLLM as it is.
    """
    # More than six parameters: each is an option.
    with exit_codes():
        from lbllm_cli.cli.serve import serve as run
        from lbllm_cli.cli.service import Service

        more = tuple(context.args)
        run(Service(model, host, port, device, engine, full_activations, trust_remote_code, more))


@app.command(epilog="Example: `lbllm validate --recipe llama2-7b.yaml model.path=./folder-with-config-json`")
def validate(
    recipe: RecipeOption,
    overrides: Overrides = None,
    json: Json = False,
    world_size: Annotated[
        int, typer.Option("--world-size", min=1, max=2**16, help="forecast for so many ranks, as torchrun would start them")
    ] = 1,
    per_node: Annotated[
        int | None,
        typer.Option("--per-node", min=1, max=2**16, help="ranks of each machine; default all, 8 at most", show_default=False),
    ] = None,
) -> None:
    """Check recipe, model, text and disk, forecast memory and time; a folder with only config.json gives the forecast alone.

    With `--world-size` the forecast is of each rank, with what ranks hand over and which link between them holds a stage up. It
    is made in one process, without torchrun.
    """
    from lbllm_cli.cli.validate import validate as check

    run(check, recipe, overrides, as_json=json, world_size=world_size, per_node=per_node)


@app.command(epilog="Example: `lbllm config --recipe llama3.1-8b ptq.group_size=64 > resolved.yaml`")
def config(
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    stages: Annotated[bool, typer.Option("--stages", help="print the recipe's stages instead: name, parent, command")] = False,
    names: Annotated[bool, typer.Option("--list", help="print the recipes that come with lbllm")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of recipes, for editors")] = False,
) -> None:
    """Print the resolved recipe, defaults and overrides included.

    With `--stages` one line per stage, its fields apart by a tab: name, the stage that it goes on from (- for none), and the
    command that makes it, behind which belongs `--recipe`. `--list` and `--schema` need no recipe.
    """
    with exit_codes():
        from lbllm_cli.cli.config import print_list, print_recipe, print_schema

        if names:
            print_list()
        elif schema:
            print_schema()
        else:
            print_recipe(recipe, overrides, stages)
