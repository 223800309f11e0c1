#!/usr/bin/env python3
"""Train the toys that the tests use: a Llama, and with --experts a mixture of experts.

They are small, but really trained on the bundled calibration text, so that their perplexity means something: a
quantization that harms the model raises it. The default run takes about a quarter of an hour on one core, with
--experts half an hour.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import sys
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

ROOT = Path(__file__).resolve().parent.parent
DOMAINS = ("novels", "technical", "modern")
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 1024
CONTEXT = 512
EVALUATION_SEGMENT = 256


def read_documents(folder: Path, domain: str) -> list[str]:
    """Return the texts of one domain, a document each."""
    with lzma.open(folder / f"{domain}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the token ids of a text of any length."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def make_config(tokenizer: PreTrainedTokenizerFast, experts: int) -> PretrainedConfig:
    """Return the configuration of the Llama, or of a mixture of some experts."""
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        # At this width the usual 0.02 learns markedly slower.
        "initializer_range": 0.06,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if not experts:
        return LlamaConfig(intermediate_size=352, **shared)
    return Qwen3MoeConfig(
        num_experts=experts,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        norm_topk_prob=True,
        # Without a loss that balances them a few experts would get all tokens.
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        **shared,
    )


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the share of the peak learning rate: a linear warm-up, then a cosine down to 2 per cent."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def train(model: PreTrainedModel, tokens: torch.Tensor, args: argparse.Namespace) -> None:
    """Train on windows taken from the token stream at random offsets."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    kept = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate_factor(s, args.steps))
    generator = torch.Generator().manual_seed(args.seed)
    window = torch.arange(CONTEXT)
    started = time.monotonic()
    model.train()
    for step in range(1, args.steps + 1):
        offsets = torch.randint(len(tokens) - CONTEXT, (args.batch, 1), generator=generator)
        batch = tokens[offsets + window]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 250 == 0 or step == args.steps:
            elapsed = time.monotonic() - started
            print(f"step {step}/{args.steps}  loss {loss.item():.3f}  {elapsed:.0f} s", flush=True)


@torch.no_grad()
def segment_losses(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Return the mean loss of every whole segment of the tokens."""
    count = len(tokens) // EVALUATION_SEGMENT
    segments = torch.tensor(tokens[: count * EVALUATION_SEGMENT]).view(count, EVALUATION_SEGMENT)
    return torch.stack([model(input_ids=s[None], labels=s[None]).loss for s in segments])


def report_perplexity(folder: Path, evaluation: Path) -> None:
    """Print the saved model's perplexity on each domain of the evaluation text and on all of them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    losses = []
    for domain in DOMAINS:
        text = "\n\n".join(read_documents(evaluation, domain))
        losses.append(segment_losses(model, encode(tokenizer, text)))
        print(f"{domain:<10} perplexity {losses[-1].mean().exp():7.2f}  ({len(losses[-1])} segments)")
    everything = torch.cat(losses)
    print(f"{'all':<10} perplexity {everything.mean().exp():7.2f}  ({len(everything)} segments)")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    text = ROOT / "src" / "lbllm_cli" / "data" / "text"
    parser = argparse.ArgumentParser(
        description="Train a toy of the tests.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="model folder; default tests/assets/toy, or toy-experts")
    parser.add_argument("--experts", type=int, default=0, help="experts of a block, of which a token takes two; 0: the Llama")
    parser.add_argument("--calibration", type=Path, default=text / "calibration", help="text to train on")
    parser.add_argument("--evaluation", type=Path, default=text / "evaluation", help="text to measure on")
    parser.add_argument("--steps", type=int, default=4000, help="training steps")
    parser.add_argument("--batch", type=int, default=2, help=f"windows of {CONTEXT} tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the windows")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    args = parse_arguments(argv)
    out = args.out or ROOT / "tests" / "assets" / ("toy-experts" if args.experts else "toy")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    transformers.logging.disable_progress_bar()

    documents = [text for domain in DOMAINS for text in read_documents(args.calibration, domain)]
    tokenizer = train_tokenizer(documents)
    stream = [token for text in documents for token in [*encode(tokenizer, text), tokenizer.eos_token_id]]
    model = AutoModelForCausalLM.from_config(make_config(tokenizer, args.experts))
    print(f"{len(stream)} tokens, {model.num_parameters()} parameters", flush=True)
    train(model, torch.tensor(stream), args)

    if args.experts:
        # The balancing loss is for training alone.
        model.config.output_router_logits = False
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    weights = out / "model.safetensors"
    # Some releases of safetensors make the file readable by its owner alone.
    weights.chmod((out / "config.json").stat().st_mode)
    report_perplexity(out, args.evaluation)
    return 0


if __name__ == "__main__":
    sys.exit(main())
