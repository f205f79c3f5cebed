"""The decode loop for all model families: cache, guidance, and drawing of tokens."""

from trl_drcd.sampling.cache import PreallocatedLayer, preallocated_cache, preallocated_cross_cache
from trl_drcd.sampling.compiled import static_cache, static_cache_refusal
from trl_drcd.sampling.drawing import Drawn, draw
from trl_drcd.sampling.generate import DrawingProcessor, generate
from trl_drcd.sampling.loop import Rollout, decode
from trl_drcd.sampling.streams import (
    CausalStream,
    CrossAttentionStream,
    Stream,
    cast_once,
    distinct_rows,
    evaluating,
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
    "cast_once",
    "decode",
    "distinct_rows",
    "draw",
    "evaluating",
    "generate",
    "preallocated_cache",
    "preallocated_cross_cache",
    "refusal",
    "static_cache",
    "static_cache_refusal",
]
