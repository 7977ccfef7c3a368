"""message[s] = the rows[s] of several tensors side by side: one message for exchanges with the same splits, in each direction.

Costs what the exchanges cost on the wire, and up to 7 bytes more per row and tensor. Each end also reads and writes the message once, to
put the rows side by side or to take them apart.
A pass over a compiled graph puts these ops in place of others. They have no backward of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from moecomm.ops.base.library import define
from moecomm.ops.exchange.all_to_all import start
from moecomm.ops.exchange.start_op import define_start
from moecomm.ops.routing.slot_bytes import message_cpu, message_fake, message_triton
from moecomm.ops.rows.gather import gather_rows_cpu, gather_rows_triton

MESSAGE = "slots_message(Tensor experts, Tensor weights, Tensor keys, Tensor order, int local, bool padded) -> Tensor"
GATHER = "gather_pairs(Tensor x, Tensor order, int k) -> Tensor"
ROWS = "rows_exchange(Tensor[] rows, Tensor? splits, SymInt size, int direction, str group) -> Tensor"
TAKE = "take_rows(Tensor message, int words, int width, ScalarType dtype) -> Tensor"
WORD = torch.int64  # the unit in which rows stand side by side; single bytes are slow to copy


def gather_pairs_fake(x: Tensor, order: Tensor, k: int) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


def words(width: int, dtype: torch.dtype) -> int:
    """The number of words for a row of ``width`` elements."""
    return -(-width * dtype.itemsize // WORD.itemsize)


def rows_fake(rows: list[Tensor], splits: Tensor | None, size: int, direction: int, group: str) -> Tensor:
    return rows[0].new_empty(size, sum(words(each.shape[1], each.dtype) for each in rows), dtype=WORD)


def rows(rows: list[Tensor], splits: Tensor | None, size: int, direction: int, group: str) -> Tensor:
    what = "what several exchanges bring home" if direction else "what several exchanges bring to the experts"
    return start(torch.cat([_as_words(each) for each in rows], 1), size, splits, direction, group, what)


def _as_words(rows: Tensor) -> Tensor:
    data = rows.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # [S, bytes]
    spare = -data.shape[1] % WORD.itemsize
    return (pad(data, (0, spare)) if spare else data).view(WORD)


def take_fake(message: Tensor, words: int, width: int, dtype: torch.dtype) -> Tensor:
    return message.new_empty(message.shape[0], width, dtype=dtype)


def take(message: Tensor, words: int, width: int, dtype: torch.dtype) -> Tensor:
    """The tensor with ``width`` elements per row that starts ``words`` words into the message."""
    size = width * dtype.itemsize
    data = message[:, words : words - -size // WORD.itemsize].clone(memory_format=torch.contiguous_format).view(torch.uint8)  # [R, bytes]
    return (data if size == data.shape[1] else data[:, :size].clone(memory_format=torch.contiguous_format)).view(dtype)


slots_message = define(MESSAGE, message_fake, message_cpu, message_triton)
gather_pairs = define(GATHER, gather_pairs_fake, gather_rows_cpu, gather_rows_triton)
rows_exchange = define_start(ROWS, rows_fake, rows, rows)
take_rows = define(TAKE, take_fake, take, take)
