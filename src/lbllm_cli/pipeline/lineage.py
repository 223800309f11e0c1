"""What a checkpoint was made from, and whether that is still what a recipe and a folder say."""

from pathlib import Path
from typing import Any

from torch import Tensor

from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.fingerprint import flatten
from lbllm_cli.data.tokens import tokens_hash
from lbllm_cli.pipeline.checkpoint import Checkpoint, complete_stages
from lbllm_cli.pipeline.inputs import differences, text_entry, text_key
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.pipeline.stage_record import PARENT, RANKS
from lbllm_cli.recipe.stages import CAME_LATER, STAGES, StageSpec


def stage_inputs(plan: Plan, spec: StageSpec, tokens: Tensor | None, parent: Checkpoint | None = None) -> dict[str, Any]:
    """Everything a stage's checkpoint depends on, by recipe key: its fingerprint, and what a refusal lists.

    Of the stage's section these are the keys that its `StageSpec` names, of its text the tokens themselves: a text that moved is
    still the same text. tokens: see `Plan.stage_tokens`; None where they are still to be sampled, of which the shape is known.
    parent: what it goes on from, by its bytes.
    """
    settings = plan.settings(spec).model_dump(mode="json")
    own = {key: value for key, value in settings.items() if key in spec.reads}
    later = {key: CAME_LATER.get(f"{spec.section}.{key}", ...) for key in own}
    own = {key: value for key, value in own.items() if value != later[key]}
    if "parent" in own:
        own["parent"] = str(plan.recipe.parent(spec))
    text = text_entry(plan.shape(spec), None) if tokens is None else text_entry(tuple(tokens.shape), tokens_hash(tokens))
    return {
        "stage": spec.name,
        "model.files": plan.model.identity(),
        "model.dtype": plan.recipe.model.dtype,
        "runtime.seed": plan.recipe.runtime.seed,
        text_key(spec): text,
        **flatten(own, spec.section),
        **({} if parent is None else {PARENT: parent.content}),
        **({} if plan.group.size == 1 else {RANKS: plan.group.size}),
    }


def open_checkpoint(plan: Plan, stage: str) -> Checkpoint:
    """A complete stage that is unchanged and belongs to this model and to the stages before it; refuses any other by name."""
    checkpoint = Checkpoint(plan.output, stage)
    made_from, now = checkpoint.inputs.get("model.files"), plan.model.identity()
    if made_from != now:
        raise UsageError(
            f"{checkpoint.path} was made from another model (expected {now[:12]}, got {str(made_from)[:12]}); "
            "set model.path to the model it was made from, or use another output.dir"
        )
    if checkpoint.record.blocks != plan.model.blocks:
        raise UsageError(
            f"{checkpoint.path} has {checkpoint.record.blocks} blocks, the model {plan.model.blocks}; "
            f"run: {checkpoint.spec.remake}"
        )
    ancestors(plan.output, checkpoint)
    checkpoint.verify()
    return checkpoint


def ancestors(output: Path, checkpoint: Checkpoint) -> list[Checkpoint]:
    """The checkpoints that one was made from, nearest first, as far as they are there.

    Raises UsageError where one of them is another than the one that the next was made from.
    """
    found: list[Checkpoint] = []
    while (parent := checkpoint.record.parent) is not None and parent.stage in complete_stages(output):
        present = Checkpoint(output, parent.stage)
        if present.content != checkpoint.inputs[PARENT]:
            raise UsageError(
                f"{checkpoint.path} was made from another {parent.stage} checkpoint than the one in {present.path}; "
                f"run: {checkpoint.spec.remake}"
            )
        found.append(present)
        checkpoint = present
    return found


def open_parent(plan: Plan, spec: StageSpec) -> Checkpoint | None:
    """The checkpoint that a stage goes on from, None where it starts from the source model.

    Raises UsageError for one that this recipe would make differently, or one of those before it. Of text that the model would
    have to write anew the shape is compared.
    """
    before = plan.recipe.parent(spec)
    if before is None:
        return None
    parent = open_checkpoint(plan, before.name)
    for checkpoint in (*reversed(ancestors(plan.output, parent)), parent):
        _check_made_alike(plan, checkpoint)
    _check_groups(plan, parent)
    if parent.record.level_bits != plan.recipe.ptq.level_bits:
        raise UsageError(
            f"{parent.path} has level bits {parent.record.level_bits}, ptq.level_bits is {plan.recipe.ptq.level_bits}; "
            "set it back, or use another output.dir"
        )
    return parent


def _check_groups(plan: Plan, parent: Checkpoint) -> None:
    """Against the parent's own record: the stage that chose them may be gone."""
    (made, _), wanted = parent.record.weights, plan.model.group_sizes(plan.recipe.ptq)
    if made.size != wanted.size:
        raise UsageError(
            f"{parent.path} has group size {made.size}, ptq.group_size is {wanted.size}; set it back, or use another output.dir"
        )
    for name in (*made.others, *wanted.others):
        own, asked = (sizes.others.get(name, sizes.size) for sizes in (made, wanted))
        if own != asked:
            raise UsageError(
                f"{parent.path} has groups of {own} in {name}, by ptq.group_sizes they are of {asked}; set it back, or use "
                "another output.dir"
            )


def _check_made_alike(plan: Plan, checkpoint: Checkpoint) -> None:
    made = STAGES[checkpoint.stage]
    wanted = stage_inputs(plan, made, plan.known_tokens(made))
    left_out = {PARENT, RANKS}
    made_from = {name: value for name, value in checkpoint.inputs.items() if name not in left_out}
    wanted.pop(RANKS, None)
    if changed := differences(made, made_from, wanted):
        raise UsageError(
            f"{checkpoint.path} was made from other inputs than this recipe's:\n{changed}\n"
            f"Set these keys back, or run: {made.remake}"
        )
