"""What `lbllm serve` is asked for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Service:
    """model: a folder or an id. device: as `--device` names it. engine: auto, vllm or transformers. more: options for vLLM, as
    they are.
    """

    model: str
    host: str
    port: int
    device: str
    engine: str
    full_activations: bool
    trust_remote_code: bool
    more: tuple[str, ...] = ()
