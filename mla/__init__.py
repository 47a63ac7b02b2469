"""Multi-head latent attention of DeepSeek-V2 and V3, and grouped-query attention to compare it with.

Needs torch and einops only; the folder works copied alone into another project.
"""

from .attention import MultiheadLatentAttention
from .cache import KVCache, LatentCache
from .convert import to_mla
from .grouped_query import GroupedQueryAttention
from .norm import RMSNorm
from .rope import Linear, Llama3, RotaryEmbedding, YaRN

__all__ = [
    "GroupedQueryAttention",
    "KVCache",
    "LatentCache",
    "Linear",
    "Llama3",
    "MultiheadLatentAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "YaRN",
    "to_mla",
]
