"""Caches of past tokens for attention, in memory allocated once."""

import torch
from einops import rearrange
from torch import Tensor

from .causal import slots
from .norm import transformed


class Cache:
    """One entry of `width` numbers per token; each row of the batch has its own length.

    Attributes:
        entries: (batch, max_length, width); undefined past a row's length.
        length: (batch,) int64 on the CPU, the number of tokens in each row.

    Raises:
        ValueError: a size is below 1; new entries have another shape, dtype or device, or exceed max_length.
    """

    def __init__(self, batch: int, max_length: int, width: int, dtype: torch.dtype | None, device=None):
        if batch < 1 or max_length < 1 or width < 1:
            raise ValueError(f"batch={batch}, max_length={max_length} and width={width} must be at least 1")
        self.entries = torch.zeros(batch, max_length, width, dtype=dtype, device=device)
        self.lengths = [0] * batch  # a list: reading a GPU tensor would synchronize

    @property
    def length(self) -> Tensor:
        return torch.tensor(self.lengths)

    @property
    def max_length(self) -> int:
        return self.entries.shape[1]

    @property
    def filled(self) -> Tensor:
        """A view of the entries up to the longest row, (batch, total, width)."""
        return self.entries[:, : max(self.lengths)]

    @property
    def nbytes(self) -> int:
        return self.entries.nbytes

    def write(self, new: Tensor) -> Tensor:
        """Append new (batch, time, width) to each row -> (batch, total of the longest row, width)"""
        self.check(new, self.entries)
        batch, max_length, _ = self.entries.shape
        time, start = new.shape[1], self.lengths
        total = max(start) + time
        if total > max_length:
            last = max_length - 1
            raise ValueError(f"cache full: position {total - 1} does not fit, {max_length=} ends at {last}")
        if transformed():
            self.entries = self.entries + new.new_zeros(())  # batched if new is: vmap writes into no other
        if torch.is_grad_enabled():
            self.entries = self.entries.clone()  # backward of earlier chunks still needs the old ones
        if min(start) == max(start):
            self.entries[:, start[0] : total] = new
        else:
            rows = torch.arange(batch, device=new.device).unsqueeze(1)  # (batch, 1)
            self.entries[rows, slots(start, time, new.device)] = new
        self.lengths = [row + time for row in start]
        return self.entries[:, :total]

    def check(self, new: Tensor, memory: Tensor) -> None:
        """Raise ValueError unless new entries match memory (..., width) in shape, dtype and device."""
        batch, width = len(self.lengths), memory.shape[-1]
        if new.ndim != 3 or new.shape[0] != batch or new.shape[2] != width:
            raise ValueError(
                f"new entries have shape {tuple(new.shape)}; the cache was made for ({batch}, time, {width})"
            )
        if new.dtype != memory.dtype or new.device != memory.device:
            made = f"{memory.dtype} on {memory.device}"
            raise ValueError(f"new entries are {new.dtype} on {new.device}; the cache is {made}")

    def truncate(self, length: int | Tensor | list[int]) -> None:
        """Keep the first `length` tokens: one number for all rows, or (batch,) one for each.

        Raises:
            ValueError: a length is not an integer, or not in 0..the row's length.
        """
        batch, given = len(self.lengths), torch.as_tensor(length)
        if given.shape not in ((), (batch,)) or given.dtype.is_floating_point:
            found = f"{given.dtype} {tuple(given.shape)}"
            raise ValueError(f"length is {found}; expected whole numbers, one or ({batch},)")
        wanted = given.expand(batch).tolist()
        for row, (new, old) in enumerate(zip(wanted, self.lengths)):
            if not 0 <= new <= old:
                raise ValueError(f"length={new} for row {row} must lie in 0..{old}, the row's length")
        self.lengths = wanted


class LatentCache(Cache):
    """MLA's cache: the normed latent and the rotated rope key, shared by all heads (V2 section 2.1.2).

    kv_lora_rank + qk_rope_head_dim numbers per token: 576 in V3, where keys and values would be 40,960.
    """

    def __init__(
        self,
        batch: int,
        max_length: int,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        dtype: torch.dtype | None = None,
        device=None,
    ):
        super().__init__(batch, max_length, kv_lora_rank + qk_rope_head_dim, dtype, device)
        self.kv_lora_rank = kv_lora_rank
        self.qk_rope_head_dim = qk_rope_head_dim

    def append(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' entries and return those of all tokens so far.

        latent (batch, time, latent), k_rope (batch, time, rope) -> the same with total for time
        """
        widths, found = (self.kv_lora_rank, self.qk_rope_head_dim), (latent.shape[-1], k_rope.shape[-1])
        if found != widths:
            raise ValueError(f"latent and k_rope have widths {found}; the cache was made for {widths}")
        entries = self.write(torch.cat((latent, k_rope), dim=-1))
        return entries[..., : self.kv_lora_rank], entries[..., self.kv_lora_rank :]


class KVCache(Cache):
    """The usual cache of MHA, GQA and MQA: a rotated key and a value for each key-value head."""

    def __init__(
        self,
        batch: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device=None,
    ):
        super().__init__(batch, max_length, 2 * num_kv_heads * head_dim, dtype, device)
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' keys and values and return those of all tokens so far.

        key, value (batch, time, kv_heads, head_dim) -> the same with total for time
        """
        widths, found = (self.num_kv_heads, self.head_dim), (tuple(key.shape[2:]), tuple(value.shape[2:]))
        if found != (widths, widths):
            raise ValueError(f"key and value have (heads, head_dim) {found}; the cache was made for {widths}")
        new = rearrange([key, value], "two batch time heads head_dim -> batch time (two heads head_dim)")
        split = "batch total (two heads head_dim) -> two batch total heads head_dim"
        key, value = rearrange(self.write(new), split, two=2, heads=self.num_kv_heads)
        return key, value


def cache_dtype(weight: Tensor) -> torch.dtype:
    """The output dtype of a projection by this weight: the weight's, or autocast's if enabled."""
    kind = weight.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else weight.dtype
