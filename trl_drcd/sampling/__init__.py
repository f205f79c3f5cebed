"""The decode loop for all model families: cache, guidance, and drawing of tokens."""

from trl_drcd.sampling.cache import PreallocatedLayer, preallocated_cache, preallocated_cross_cache
from trl_drcd.sampling.compiled import static_cache, static_cache_refusal
from trl_drcd.sampling.drawing import Drawn, draw
from trl_drcd.sampling.generate import DrawingProcessor, generate
from trl_drcd.sampling.loop import Rollout, decode
from trl_drcd.sampling.modes import evaluating, sampling_mode
from trl_drcd.sampling.streams import (
    CausalStream,
    CrossAttentionStream,
    Stream,
    distinct_rows,
    refusal,
)

__all__ = [
    "CausalStream",
    "CrossAttentionStream",
    "DrawingProcessor",
    "Drawn",
    "PreallocatedLayer",
    "Rollout",
    "Stream",
    "decode",
    "distinct_rows",
    "draw",
    "evaluating",
    "generate",
    "preallocated_cache",
    "preallocated_cross_cache",
    "refusal",
    "sampling_mode",
    "static_cache",
    "static_cache_refusal",
]
