"""Multi-head latent attention of DeepSeek-V2 and V3, and grouped-query attention for comparison.

Depends on torch and einops only: the folder can be copied into another project.
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
