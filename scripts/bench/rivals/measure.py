"""Measures a model folder as `lbllm eval` measures a checkpoint: perplexity, KL to the base model, likeliest tokens, tasks."""

from pathlib import Path
from typing import Any

import torch
from ground import Ground
from torch import Tensor

from lbllm_cli.evaluation import tasks as lm_tasks
from lbllm_cli.models.model import SourceModel
from lbllm_cli.pipeline.streams import advance, embed_stream
from lbllm_cli.training.agreement import POSITIONS, Agreement, Predictions

TASKS = ["builtin:continuation", "builtin:last_word"]


def final_states(model: SourceModel, sets: dict[str, Tensor], batch_size: int) -> dict[str, Tensor]:
    """What the last block makes of each text: [segments, length, hidden] in memory."""
    streams = {text: embed_stream(model, tokens, None, batch_size) for text, tokens in sets.items()}
    for index in range(model.blocks):
        block = model.block(index)
        for stream in streams.values():
            advance(block, stream, stream, model.device, batch_size)
    return {text: stream.data for text, stream in streams.items() if stream.data is not None}


def base_states(ground: Ground, sets: dict[str, Tensor]) -> dict[str, Tensor]:
    """`final_states` of the base model: they are the same for every row, so the first one leaves them on disk."""
    path = ground.out / "base_states.pt"
    if not path.exists():
        states = final_states(ground.model, sets, ground.plan.recipe.runtime.batch_size)
        partial = path.with_suffix(".partial")
        torch.save(states, partial)
        partial.rename(path)
    found: dict[str, Tensor] = torch.load(path, weights_only=True)
    return found


@torch.no_grad()
def measure(ground: Ground, rival: SourceModel | None) -> dict[str, Any]:
    """Of a rival, or of the base model itself: {"perplexity": {text: ...}, "kl": ..., "top1": ...}; the base has no KL."""
    sets = ground.plan.evaluation()
    batch_size = ground.plan.recipe.runtime.batch_size
    base = base_states(ground, sets)
    own = {} if rival is None else final_states(rival, sets, batch_size)
    base_head = ground.model.head()
    head = base_head if rival is None else rival.head()
    found: dict[str, dict[str, float]] = {"perplexity": {}, "kl": {}, "top1": {}}
    for text, tokens in sets.items():
        agreement = Agreement(tokens.shape[1])
        for row, wanted in enumerate(tokens[:, 1:]):
            for start in range(0, len(wanted), POSITIONS):
                piece = slice(start, min(start + POSITIONS, len(wanted)))
                teacher = Predictions(base_head(base[text][row, piece]))
                student = teacher if rival is None else Predictions(head(own[text][row, piece]))
                agreement.add(start, teacher, student, wanted[piece])
        found["perplexity"][text] = round(agreement.perplexity, 4)
        found["kl"][text] = round(agreement.mean_divergence, 6)
        found["top1"][text] = round(agreement.top1, 6)
    return found if rival is not None else {"perplexity": found["perplexity"]}


def task_scores(ground: Ground, folder: Path) -> dict[str, Any]:
    """Scores of the bundled tasks on a folder: {"lbllm_last_word": {"acc": ...}, ...}."""
    recipe = ground.plan.recipe
    lm = lm_tasks.open_lm(folder, ground.model.dtype, ground.model.device, recipe.eval.batch_size, trust_remote_code=False)
    planned = lm_tasks.plan_tasks(TASKS, recipe.eval.num_fewshot)
    scores: dict[str, Any] = {}
    for task in planned:
        scores |= lm_tasks.scores(lm_tasks.run_task(lm, task, recipe.eval.limit), task.name)
    return scores
