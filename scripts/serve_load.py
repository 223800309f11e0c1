#!/usr/bin/env python3
"""A served model under load: tokens per second of many requests at once, and whether memory grows.

    python scripts/serve_load.py --model runs/smollm2-135m/export --requests 500 --together 32
    python scripts/serve_load.py --model models/smollm2-135m --requests 64 -- --dtype bfloat16

Starts `lbllm serve --engine vllm` (what follows -- goes to vLLM), sends requests of mixed lengths through the openai client, and
prints a row for each tenth of them: tokens per second, resident memory of all of the server's processes. Exit code 1 where an
answer is missing or of another length than asked for.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil

WORDS = ("the", "sea", "was", "calm", "and", "boat", "went", "on", "along", "shore", "till", "night", "fell", "over", "all")
READY = "Application startup complete"


def asked(number: int) -> tuple[str, int]:
    """Prompt and tokens of a request: 8 to 135 words, 16 to 64 tokens."""
    length = 8 + 37 * number % 128
    # The number first: no two share a beginning that a cache could keep.
    return f"{number} " + " ".join(WORDS[(number + place) % len(WORDS)] for place in range(length)), 16 + 29 * number % 49


def resident(process: psutil.Process) -> float:
    """MiB of a process and its children; what they share counts once for each."""
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True))) / 2**20


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--together", type=int, default=32)
    parser.add_argument("--port", type=int, default=18765)
    parser.add_argument("more", nargs="*", help="options of vLLM")
    args = parser.parse_args()
    command = [sys.executable, "-m", "lbllm_cli", "serve", "--model", args.model, "--engine", "vllm", "--port", str(args.port)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as out:
            process = subprocess.Popen([*command, "--", *args.more], stdout=out, stderr=out)
        try:
            while READY not in log.read_text():
                if process.poll() is not None:
                    print(log.read_text()[-3000:], file=sys.stderr)
                    return 1
                time.sleep(0.5)
            return load(args, psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait()


def load(args: argparse.Namespace, server: psutil.Process) -> int:
    """Sends the requests; 1 where an answer is wrong."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{args.port}/v1", api_key="none", timeout=3600, max_retries=0)
    model = client.models.list().data[0].id

    def ask(number: int) -> tuple[int, int]:
        prompt, tokens = asked(number)
        found = client.completions.create(
            model=model, prompt=prompt, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}
        )
        if found.usage.completion_tokens != tokens:
            raise ValueError(f"request {number}: expected {tokens} tokens, got {found.usage.completion_tokens}")
        return found.usage.prompt_tokens, tokens

    share = max(args.together, args.requests // 10)
    print("| requests | tokens read | tokens written | written per second | resident MiB |", flush=True)
    print("|---:|---:|---:|---:|---:|", flush=True)
    with ThreadPoolExecutor(args.together) as pool:
        for first in range(0, args.requests, share):
            begun = time.monotonic()
            answers = list(pool.map(ask, range(first, min(first + share, args.requests))))
            seconds = time.monotonic() - begun
            read, written = map(sum, zip(*answers, strict=True))
            done = first + len(answers)
            print(f"| {done} | {read} | {written} | {written / seconds:.1f} | {resident(server):.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
