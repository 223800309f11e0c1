"""Keys of a recipe that finished stages were not made with, for commands that take stages as they are."""

from collections.abc import Collection, Iterable

from lbllm_cli.core.fingerprint import changes
from lbllm_cli.pipeline.checkpoint import Checkpoint
from lbllm_cli.pipeline.inputs import differences
from lbllm_cli.pipeline.lineage import ancestors, stage_inputs
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.pipeline.stage_record import PARENT, RANKS
from lbllm_cli.recipe.stages import STAGES, TABLE


def other_keys(plan: Plan, checkpoints: Iterable[Checkpoint], used: Collection[str] = ()) -> str | None:
    """What to say of keys that checkpoints, or the stages that they came of, were made with other values of; None where there are
    none.

    Keys of stages that none of them came of are not compared, and of text the sequences and their length alone: its tokens are
    not read. used: keys that the command reads itself. Raises UsageError as `ancestors`.
    """
    made: dict[str, Checkpoint] = {}
    for checkpoint in checkpoints:
        made |= {found.stage: found for found in (checkpoint, *ancestors(plan.output, checkpoint))}
    listed = {stage: lines for stage in STAGES if stage in made and (lines := _lines(plan, made[stage], made, used))}
    if not listed:
        return None
    keys = "\n".join(dict.fromkeys(line for found in listed.values() for line in found))
    return (
        f"{', '.join(listed)} in {plan.output} came of other keys than this recipe's, which change nothing here:\n{keys}\n"
        f"Set these keys back, or run: {STAGES[next(iter(listed))].remake}"
    )


def _lines(plan: Plan, checkpoint: Checkpoint, made: Collection[str], used: Collection[str]) -> list[str]:
    """One line for each key of a stage's own that is another now. made: stages that are compared."""
    spec, ptq, left_out = checkpoint.spec, plan.recipe.ptq, {PARENT, RANKS, *used}
    if plan.recipe.section(spec.section) is None:
        return [f"  {spec.section}: given -> absent"]
    before, now = (
        {key: value for key, value in inputs.items() if key not in left_out}
        for inputs in (checkpoint.inputs, stage_inputs(plan, spec, None))
    )
    found = differences(spec, before, now).splitlines()
    if TABLE[0].name in made:
        return found
    # The stage that chose these is gone; all that came of it record them.
    sizes, bits = checkpoint.record.weights
    recorded = {"ptq.group_size": sizes.size, "ptq.level_bits": bits}
    return [*changes(recorded, {"ptq.group_size": ptq.group_size, "ptq.level_bits": ptq.level_bits}).splitlines(), *found]
