"""How files hold integers in another order or code than slots: GPTQ, AWQ, and packed zero points.

The C++ core does the same where an expert is read: csrc/transfer/transpose.cpp and recode.cpp. This
is the straight way, for dense weights and for reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, of eight, of each integer of a word


@dataclass(frozen=True, slots=True)
class Stored:
    """How a file holds one piece of a matrix.

    turned: bytes of an element of a piece that is stored column by column; 0: it is not
    code: what is in the slot's place then. "signs": bytes with 128 added. "awq": words [rows / 8,
        columns] of an integer of each of 8 rows. "zeros", "awq_zeros": words of the zero points of
        a column. "": what belongs there
    bits: of an integer. plus: added to zero points, without carry
    """

    turned: int = 0
    code: str = ""
    bits: int = 4
    plus: int = 0

    def __str__(self) -> str:
        """In words, as a part of the word for a format: no two of them have the same."""
        codes = {
            "": "",
            "signs": "with 128 added",
            "awq": "in words as AWQ has them",
            "zeros": f"in words of {self.bits} bits",
            "awq_zeros": "in words as AWQ has them",
        }
        by_columns = "column by column" if self.turned else ""
        less = f"less {self.plus}" if self.plus else ""
        return " ".join(filter(None, (by_columns, codes[self.code], less)))

    def read(self, raw: torch.Tensor, shape: tuple[int, ...], rows: int) -> torch.Tensor:
        """uint8: the bytes that a slot has, of the bytes of a tensor of this shape in a file.

        rows: of the piece in the slot.
        """
        if self.turned:
            matrix = raw.view(*shape[-2:], -1)
            raw = matrix.transpose(0, 1).contiguous().view(-1)
        if self.code == "signs":
            return raw ^ 128
        if not self.code:
            return raw
        words = raw.view(torch.int32)
        each = 32 // self.bits
        shifts = torch.arange(each, dtype=torch.int32) * self.bits
        mask = (1 << self.bits) - 1
        blocks = words.view(rows // each, 1, -1) >> shifts[None, :, None] & mask
        if self.code.startswith("awq"):
            ordered = torch.empty_like(blocks)
            ordered[:, list(AWQ_ORDER)] = blocks
            blocks = ordered
        codes = blocks.reshape(rows, -1)
        if self.code == "awq":
            return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8).view(-1)
        zeros = (codes + self.plus & mask) - (1 << (self.bits - 1))
        return zeros.to(torch.int8).view(-1).view(torch.uint8)
