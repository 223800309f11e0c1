"""How much sooner several processes of one thread each are done than one, on the first blocks of a model.

    python scripts/bench_ranks.py --model models/smollm2-135m --out runs/bench-ranks

Rounds take turns: one process; two ranks that share the work; and, as what this machine gives at most, two processes that know
nothing of each other and have half of the sequences each. Reported are medians of the ratios within a round. A stage's time is
that of its blocks as its records say, without what a process needs to begin; of eval it is what its log says, in whole seconds.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

STAGES = ("ptq", "distill", "act-calib", "eval")


def first_blocks(model: Path, folder: Path, blocks: int) -> Path:
    """A model of the first blocks of another."""
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for file in model.iterdir():
            if file.suffix in (".json", ".txt", ".model") and "index" not in file.name:
                shutil.copyfile(file, folder / file.name)
        tensors = {}
        for file in model.glob("*.safetensors"):
            with safe_open(file, "pt") as source:
                for name in source.keys():  # noqa: SIM118 (not a dict)
                    block = re.match(r"model\.layers\.(\d+)\.", name)
                    if block is None or int(block[1]) < blocks:
                        tensors[name] = source.get_tensor(name)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": blocks}))
    return folder


def recipe(model: Path, sequences: int, length: int, batch: int) -> str:
    """As a file would say it."""
    text = f'{{source: "builtin:calibration", sequences: {sequences}, length: {length}}}'
    return (
        f"recipe_version: 1\nmodel: {{path: {model}}}\noutput: {{dir: runs}}\nruntime: {{device: cpu}}\n"
        f"data:\n  calibration: {text}\n  training: {text}\n  evaluation:\n"
        f'    - {{name: novels, source: "builtin:evaluation/novels", length: {length}, segments: {sequences}}}\n'
        f"ptq: {{group_size: 64}}\ndistill: {{epochs: 2, batch_size: {batch}, micro_batch_size: 2}}\n"
        f"act_calib: {{soft: 0, epochs: 1, batch_size: {batch}, micro_batch_size: 2}}\n"
    )


def started(ranks: int, stage: str, file: Path, output: Path) -> subprocess.Popen[str]:
    """One stage, begun."""
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", str(ranks), "-m", "lbllm_cli"]
    alone = [sys.executable, "-m", "lbllm_cli"]
    command = [*(alone if ranks == 1 else torchrun), stage, "--recipe", str(file), f"output.dir={output}", "--force"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def seconds(process: subprocess.Popen[str], stage: str, output: Path) -> float:
    """What a stage took, once it has ended."""
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"{stage} failed:\n{said}")
    if stage == "eval":
        minutes, rest = re.findall(r"finished in (\d+):(\d+) min:s", said)[-1]
        return 60.0 * int(minutes) + int(rest)
    lines = (output / stage / "events.jsonl").read_text().splitlines()
    return sum(json.loads(line)["seconds"] for line in lines)


def main() -> None:
    """Runs the rounds that the table does not have yet, and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    model = first_blocks(options.model, out / "model", options.blocks)
    files = {}
    for count in (options.sequences, options.sequences // 2):
        files[count] = out / f"recipe-{count}.yaml"
        files[count].write_text(recipe(model, count, options.length, options.batch))
    settings = {name: str(getattr(options, name)) for name in ("model", "blocks", "sequences", "length", "batch")}
    record, table = out / "settings.json", out / "rounds.jsonl"
    if record.exists() and json.loads(record.read_text()) != settings:
        sys.exit(f"{out} holds rounds of other options; choose another --out")
    record.write_text(json.dumps(settings))
    done = len(table.read_text().splitlines()) if table.exists() else 0
    full, half = files[options.sequences], files[options.sequences // 2]
    for _ in range(done, options.rounds):
        row = {}
        for stage in options.stages:
            row[stage] = {
                "one": seconds(started(1, stage, full, out / "one"), stage, out / "one"),
                "ranks": seconds(started(2, stage, full, out / "ranks"), stage, out / "ranks"),
            }
            halves = [out / f"half{number}" for number in range(2)]
            pair = [started(1, stage, half, folder) for folder in halves]
            row[stage]["halves"] = max(seconds(one, stage, folder) for one, folder in zip(pair, halves, strict=True))
        with table.open("a") as handle:
            handle.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    rounds = [json.loads(line) for line in table.read_text().splitlines()]
    print("| stage | one process, s | two ranks | two processes with half each |\n|---|---:|---:|---:|")
    for stage in options.stages:
        if not (measured := [row[stage] for row in rounds if stage in row]):
            print(f"| {stage} | not in these rounds: choose another --out | | |")
            continue
        one = statistics.median(row["one"] for row in measured)
        ratios = (statistics.median(row["one"] / row[kind] for row in measured) for kind in ("ranks", "halves"))
        print(f"| {stage} | {one:.1f} | " + " | ".join(f"{ratio:.2f}x" for ratio in ratios) + " |")


if __name__ == "__main__":
    main()
