"""Ranks that are killed at any moment: whether what they resume is what an uninterrupted run makes, byte for byte.

    python scripts/kill_ranks.py --ranks 2 --kills 20 --out runs/killed

Each time the stages of a recipe run on several processes with one thread each. One of these, drawn by chance, gets SIGKILL at a
moment of their work drawn by chance; all others have to end within a minute, with one message. The same command is then given
again, and every file of weights and every manifest is compared with those of a run that nobody disturbed. A table is written as
it goes; what is in it is not run again.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEYS = [
    "data.calibration.sequences=16", "data.training.sequences=32", "distill.batch_size=4", "distill.epochs=2",
    "act_calib.batch_size=4", "act_calib.epochs=1", "distill.end_to_end={sequences: 16, batch_size: 4}", "runtime.save_minutes=0",
]  # fmt: skip
STAGES = ("ptq", "distill", "act-calib")
TICK = 0.01
# Seconds that the ranks which are left may take to end.
LONGEST = 60
PROMISED = re.compile(r"block_\d+\.safetensors|outer\.safetensors|lbllm_stage\.json")


def command(stage: str, output: Path, ranks: int, streams: str) -> list[str]:
    """One stage on several processes."""
    return [
        str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", str(ranks), "-m", "lbllm_cli", stage, "--recipe",
        str(ROOT / "recipes" / "toy.yaml"), f"output.dir={output}", f"runtime.streams={streams}", *KEYS,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """One thread in each process."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def hashes(output: Path) -> dict[str, str]:
    """Of everything that equal runs have in common."""
    found = sorted(path for path in output.glob("*/*") if PROMISED.fullmatch(path.name))
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def works(output: Path) -> bool:
    """Whether a stage is under way: what comes before is the same for one process, and takes longer on a toy."""
    return any(output.glob("*.partial/progress.json"))


def whole(output: Path, ranks: int, streams: str) -> float:
    """All stages without a disturbance; seconds that they worked."""
    worked = 0.0
    for stage in STAGES:
        process = subprocess.Popen(
            command(stage, output, ranks, streams), env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        while process.poll() is None:
            time.sleep(TICK)
            worked += TICK if works(output) else 0
        assert process.returncode == 0, f"{stage} fails undisturbed"
    return worked


def members(launcher: int) -> list[int]:
    """Processes that torchrun has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    return [int(text) for text in children.read_text().split()] if children.exists() else []


def disturbed(output: Path, ranks: int, streams: str, moment: float, chance: random.Random) -> dict[str, object]:
    """All stages, one rank killed after `moment` seconds of work; what became of the others."""
    worked, told = 0.0, dict[str, object]()
    for stage in STAGES:
        process = subprocess.Popen(
            command(stage, output, ranks, streams), env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip
        while process.poll() is None and not told:
            time.sleep(TICK)
            worked += TICK if works(output) else 0
            if worked >= moment and works(output) and len(found := members(process.pid)) == ranks:
                victim = chance.randrange(ranks)
                os.kill(found[victim], signal.SIGKILL)
                killed = time.monotonic()
                _, errors = process.communicate(timeout=120)
                said = [line for line in errors.splitlines() if line.startswith("lbllm: ")]
                told = {"stage": stage, "rank": victim, "ended_after": round(time.monotonic() - killed, 1), "messages": said}
        process.communicate()
        if process.returncode:
            # As a user would: the same command again.
            subprocess.run(command(stage, output, ranks, streams), check=True, env=environment(), capture_output=True)
    return told


def main() -> None:
    """Runs what the table does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streams", choices=("ram", "disk"), default="ram")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table = options.out / f"kills-{options.ranks}-{options.streams}-{options.seed}.jsonl"
    reference, kept = options.out / f"whole-{options.ranks}", options.out / f"whole-{options.ranks}.json"
    if not kept.exists():
        shutil.rmtree(reference, ignore_errors=True)
        seconds = whole(reference, options.ranks, options.streams)
        kept.write_text(json.dumps({"seconds": seconds, "hashes": hashes(reference)}))
    known = json.loads(kept.read_text())
    done = len(table.read_text().splitlines()) if table.exists() else 0
    for number in range(done, options.kills):
        chance = random.Random(options.seed * 1000 + number)
        output = options.out / "killed"
        shutil.rmtree(output, ignore_errors=True)
        moment = chance.uniform(0, known["seconds"])
        facts = disturbed(output, options.ranks, options.streams, moment, chance)
        record = {"kill": number, "moment": round(moment, 2), **facts, "equal": hashes(output) == known["hashes"]}
        with table.open("a") as handle:
            handle.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
    records = [json.loads(line) for line in table.read_text().splitlines()]
    killed = [record for record in records if "rank" in record]
    equal = sum(record["equal"] for record in killed)
    slowest = max((record["ended_after"] for record in killed), default=0)
    silent = [record["kill"] for record in killed if len(record["messages"]) != 1]
    print(f"{equal} of {len(killed)} resumed runs equal the undisturbed one; the others ended within {slowest} s")
    if silent:
        print(f"kills {silent}: not one message of the ranks that were left")
    if len(killed) < len(records):
        print(f"{len(records) - len(killed)} runs ended before their moment: nobody was killed, and they count for nothing")
    if equal < len(killed) or not killed or silent or slowest > LONGEST:
        sys.exit(1)


if __name__ == "__main__":
    main()
