"""What is said once in a process, where a model runs in another way than its user may expect."""

import logging
from functools import cache

_log = logging.getLogger("lbllm")


@cache
def say_in_torch(layer: str, linear: str) -> None:
    """That kernels leave some linears. layer: name of a decoder layer's class. linear: the first of them."""
    _log.warning(
        "%s of %s runs in torch: its groups do not divide act_calib.group_size, or it is on another device; no decode step is a "
        "single call",
        linear,
        layer,
    )


@cache
def say_layer_by_layer(layer: str) -> None:
    """That decode steps of a kind of decoder layer are not one call. layer: name of its class."""
    _log.warning("decode steps of %s are no single call: linears run in the kernels, all else in torch, layer by layer", layer)
