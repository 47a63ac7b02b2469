"""Block-quantised FP8 weights, the format of the DeepSeek-V3 and Kimi K2 checkpoints (V3 section 3.3.2)."""

import torch
from torch import Tensor

BLOCK = 128  # rows and columns that share a scale; edge blocks are smaller
LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (rows, columns) -> FP8 of the same shape, scale_inv (row blocks, column blocks) fp32

    Each block is scaled so that its largest magnitude becomes 448; a block of zeros stays zero.
    """
    rows, columns = matrix_shape(weight)
    wide = weight.float()
    padded = wide.new_zeros(-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK)
    padded[:rows, :columns] = wide.abs()
    largest = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).amax(dim=(1, 3))
    scale_inv = torch.where(largest > 0, largest / LARGEST, 1.0)  # (row blocks, column blocks)
    return (wide / spread(scale_inv, rows, columns)).to(torch.float8_e4m3fn), scale_inv


def dequantize(weight: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """FP8 weight (rows, columns) x scale_inv of each block, computed in fp32 -> the same shape in dtype

    Despite its name in the checkpoints, weight_scale_inv is a multiplier.

    Raises:
        ValueError: weight is not a matrix, or there is not one scale per 128 x 128 block.
    """
    rows, columns = matrix_shape(weight)
    blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    if scale_inv.shape != blocks:
        found = tuple(scale_inv.shape)
        raise ValueError(f"scale_inv has shape {found}; {rows} x {columns} weights need {blocks}")
    return (weight.float() * spread(scale_inv.float(), rows, columns)).to(dtype)


def matrix_shape(weight: Tensor) -> tuple[int, int]:
    """-> rows, columns"""
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (rows, columns)")
    rows, columns = weight.shape
    return rows, columns


def spread(scale_inv: Tensor, rows: int, columns: int) -> Tensor:
    """Repeat each block's scale over its numbers: (row blocks, column blocks) -> (rows, columns)"""
    return scale_inv.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
