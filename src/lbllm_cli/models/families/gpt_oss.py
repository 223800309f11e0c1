"""GPT-OSS: linears have biases, experts lie transposed with gate and up row by row in turn, attention has sinks.

OpenAI's own files hold experts in MXFP4; what is read here are copies in bfloat16.
"""

from lbllm_cli.core.headers import Part
from lbllm_cli.models.families import Family

_UP, _UP_BIAS = "mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias"

FAMILY = Family(
    "gpt_oss",
    "GPT-OSS in bfloat16",
    plain_softmax=False,
    stored={
        "mlp.experts.{e}.gate_proj.weight": Part(_UP, transposed=True, half=0, interleaved=True),
        "mlp.experts.{e}.up_proj.weight": Part(_UP, transposed=True, half=1, interleaved=True),
        "mlp.experts.{e}.down_proj.weight": Part("mlp.experts.down_proj", transposed=True),
        "mlp.experts.{e}.gate_proj.bias": Part(_UP_BIAS, half=0, interleaved=True),
        "mlp.experts.{e}.up_proj.bias": Part(_UP_BIAS, half=1, interleaved=True),
        "mlp.experts.{e}.down_proj.bias": Part("mlp.experts.down_proj_bias"),
    },
)
