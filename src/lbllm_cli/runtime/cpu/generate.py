"""`model.generate` in the library: one text at a time, a call for the tokens that are new instead of one for each block."""

from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from lbllm_cli.engine import abi
from lbllm_cli.engine.model import Session
from lbllm_cli.engine.rope import KINDS
from lbllm_cli.runtime.attachments import plain_attention
from lbllm_cli.runtime.cpu.block import BlockStep
from lbllm_cli.runtime.cpu.captured import CapturedModules
from lbllm_cli.runtime.cpu.head import HeadLinear
from lbllm_cli.runtime.cpu.library import DTYPES, pointer

# transformers' models that are an embedding, layers that the library knows, a norm and a head, and nothing else.
_MODELS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SeedOssForCausalLM")
# Of a call, what is no setting; whatever else has a value is for transformers.
_READ = {
    "inputs", "input_ids", "attention_mask", "generation_config", "logits_processor", "stopping_criteria",
    "prefix_allowed_tokens_fn", "streamer",
}  # fmt: skip
# Settings that change logits or say when to stop: transformers makes processors and criteria of them, which run here too. Not
# stop_strings: it needs a tokenizer, which transformers 5.23 does not hand on where it is given a loop.
_TAKEN = {
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "do_sample", "temperature",
    "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "no_repeat_ngram_size",
    "bad_words_ids", "renormalize_logits", "remove_invalid_values", "forced_bos_token_id", "forced_eos_token_id",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "watermarking_config",
    "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
# Values of the others that change nothing, where the class does not say: it leaves most of them out.
_IDLE: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "guidance_scale": 1.0}
# What generate() says of itself, and what is read by others.
_ASIDE = {"transformers_version", "_from_model_config"}


@dataclass
class _Native:
    """A loaded model as `engine.model.Runnable`. kept: what its structures point to."""

    lib: Any
    struct: abi.Model
    threads: int
    kv_heads: int
    record_bytes: list[int]
    limit: int
    kept: Any


class NativeGenerate:
    """Stands for a model's `generate`. One text, drawn or of the likeliest tokens, goes through the library as a whole; beams,
    rows, caches of a caller and the rest go through transformers, whose own `generate` prepares both.

    model: its layers' `forward` are `BlockStep`s. It is computed as it is now: where a module was replaced, wrapped, overridden
    or given a hook since, transformers computes it. Hidden states are float32, whatever the model's dtype.
    """

    def __init__(self, model: Any, steps: list[BlockStep]):
        self.model, self.steps = model, steps
        self.names = list(signature(type(model).generate).parameters)[1:]
        self.modules = CapturedModules(model, dict(zip(model.get_decoder().layers, steps, strict=True)))

    def remove(self) -> None:
        """Puts the model's own back."""
        self.model.__dict__.pop("generate", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        tokens = self._one_text(given)
        native = self._native() if tokens is not None else None
        if tokens is None or native is None:
            return type(self.model).generate(self.model, *args, **kwargs)
        # It is all ones, and transformers need not guess it.
        whole = {**given, "attention_mask": torch.ones_like(tokens), "custom_generate": _Loop(native, given.get("streamer"))}
        return type(self.model).generate(self.model, **whole)

    def _one_text(self, given: dict[str, Any]) -> Tensor | None:
        """The prompt [1, length] of a call that the loop can do, else None."""
        tokens, mask = given.get("inputs"), given.get("attention_mask")
        tokens = given.get("input_ids") if tokens is None else tokens
        if not isinstance(tokens, Tensor) or tokens.device.type != "cpu" or tokens.is_floating_point():
            return None
        if tokens.dim() != 2 or len(tokens) != 1 or not tokens.shape[1]:
            return None
        if mask is not None and (mask.shape != tokens.shape or not bool((mask == 1).all())):
            return None
        configs = [self.model.generation_config, given.get("generation_config") or GenerationConfig()]
        settings = [{name: value for name, value in given.items() if name not in _READ}, *(one.to_dict() for one in configs)]
        if not all(_idle(name, value) for source in settings for name, value in source.items()):
            return None
        pads = [source.get("pad_token_id") for source in settings]
        return None if mask is None and any(bool((tokens == pad).any()) for pad in pads if pad is not None) else tokens

    def _native(self) -> _Native | None:
        """The model as the library reads it, None where it cannot as it is now."""
        model: Any = self.model
        decoder, head = model.get_decoder(), model.get_output_embeddings()
        if model.training or torch.compiler.is_compiling() or not plain_attention(decoder.config) or not self._holds():
            return None
        rows, norm, angles = [decoder.embed_tokens.weight, head.weight], decoder.norm.weight, decoder.rotary_emb.inv_freq
        shape = rows[0].shape
        alike = rows[1].shape == shape and norm.shape == shape[1:] and angles.dtype == torch.float32
        if not alike or not all(map(_readable, (*rows, norm, angles))):
            return None
        known = [block for step in self.steps if (block := step.block()) is not None]
        if len(known) != len(self.steps) or decoder.config.num_hidden_layers != len(known):
            return None
        first, record_bytes = known[0].block, known[0].record_bytes
        if any(one.record_bytes != record_bytes for one in known) or angles.shape != (first.head_dim // 2,):
            return None
        structs = (abi.Block * len(known))(*(one.block for one in known))
        struct = abi.Model(
            structs, *(abi.Rows(pointer(weight), None, DTYPES[weight.dtype]) for weight in rows), pointer(norm), pointer(angles),
            amplitude=float(decoder.rotary_emb.attention_scaling), epsilon=float(decoder.norm.variance_epsilon), count=len(known),
            vocab=shape[0], hidden=shape[1], head_dim=first.head_dim, norm_dtype=DTYPES[norm.dtype],
        )  # fmt: skip
        return _Native(
            abi.library(), struct, torch.get_num_threads(), first.kv_heads, record_bytes,
            limit=int(decoder.config.max_position_embeddings), kept=(known, rows, norm, angles),
        )  # fmt: skip

    def _holds(self) -> bool:
        """Whether the model is still made of what was noted, and nobody listens to it."""
        model = self.model
        heard = "forward" in vars(model) or model._forward_hooks or model._forward_pre_hooks
        return not heard and self.modules.hold() and model.get_output_embeddings().bias is None


class _Loop:
    """A decoding loop as `generate(custom_generate=)` takes it, which has prepared processors, criteria and lengths.

    streamer: of the call. transformers 5.23 puts the prompt into it, and does not hand it on.
    """

    def __init__(self, native: _Native, streamer: Any):
        self.native, self.streamer = native, streamer

    def __call__(
        self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """Tokens of the prompt and those behind it, int64 [1, length]."""
        session = Session(self.native)
        coming = input_ids[0].tolist()
        while True:
            # The session writes over its logits, and so may a processor.
            logits = torch.from_numpy(session.run(coming)).clone()[None]
            scores = logits_processor(input_ids, logits)
            if generation_config.do_sample:
                token = torch.multinomial(scores.softmax(-1), num_samples=1)
            else:
                token = scores.argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, token], dim=-1)
            if self.streamer is not None:
                self.streamer.put(token[0])
            if bool(stopping_criteria(input_ids, None).all()):
                break
            coming = token[0].tolist()
        if self.streamer is not None:
            self.streamer.end()
        return input_ids


def _idle(name: str, value: Any) -> bool:
    """Whether a setting leaves the loop as it is."""
    if name == "use_cache":
        return value is None or value is True
    return name in _TAKEN or name in _ASIDE or value is None or value is False or value == _IDLE.get(name)


def _readable(tensor: Any) -> bool:
    """Whether the library reads a weight where it lies."""
    return isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.dtype in DTYPES and tensor.is_contiguous()


def generates(model: Any) -> bool:
    """Whether a model whose layers are all in steps is one that the library knows as a whole: full attention, nothing scaled."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    table = getattr(decoder, "embed_tokens", None)
    if type(model).__name__ not in _MODELS or type(head) is not HeadLinear or type(table) is not nn.Embedding or table.max_norm:
        return False
    sliding = any(isinstance(layer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=decoder.config).layers)
    return not sliding and getattr(decoder.rotary_emb, "rope_type", None) in KINDS
