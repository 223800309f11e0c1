"""How many calibration tokens an expert will get, if the router spreads them evenly."""

from dataclasses import dataclass
from math import ceil

from lbllm_cli.models.block import block_prefix
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.recipe.stages import TABLE
from lbllm_cli.runtime.experts import expert_of


@dataclass(frozen=True)
class Routing:
    """experts: in a block. chosen: by a token. tokens: of the calibration text that one expert gets on average. width: of the
    widest input of its linears, whose Hessian needs as many. sequences: of the calibration text that would give each that many.
    """

    experts: int
    chosen: int
    tokens: int
    width: int
    sequences: int

    def line(self) -> str:
        """In words."""
        each = f"{self.experts} experts, of which a token takes {self.chosen}: about {self.tokens:,} calibration tokens each"
        if self.tokens >= self.width:
            return f"{each}, their Hessians need {self.width:,}"
        return (
            f"{each}, fewer than the {self.width:,} that their Hessians need: they are drawn towards that of all tokens; "
            f"data.calibration.sequences: {self.sequences:,} would do"
        )


def routing_of(plan: Plan) -> Routing | None:
    """None for a model without experts."""
    model = plan.model
    if model.experts is None:
        return None
    text = plan.token_set(TABLE[0])
    (experts, chosen), tokens = model.experts, text.sequences * text.length
    width = max(model.shapes[f"{block_prefix(0)}{name}.weight"][1] for name in model.linears if expert_of(name) is not None)
    return Routing(experts, chosen, tokens * chosen // experts, width, ceil(width * experts / (chosen * text.length)))
