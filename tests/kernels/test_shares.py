"""How many programs of the refinement have something to do."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = triton.language

from lamp_compile.runtime.kernels.decide import on_lists, shared_by  # noqa: E402

PACK = 2


@triton.jit
def ask(TAKEN, OUT, AT, chunks, segments, PACK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS_P2: tl.constexpr):
    count, taking = shared_by(TAKEN, 0, chunks, segments, PACK, CHUNKS_P2)
    tl.store(OUT, count)
    tl.store(OUT + 1, taking)
    entry, chunk = tl.arange(0, 16), tl.arange(0, CHUNKS_P2)
    counts = tl.load(TAKEN + chunk * 2, mask=chunk < chunks, other=0)
    tl.store(AT + entry, on_lists(counts, entry, CHUNK))


def asked(counts: list[int], filled: int, segments: int, device: torch.device) -> tuple[int, int, list[int]]:
    """Count, programs, and where the first entries stand, with chunks of 100."""
    taken = torch.tensor([[count, filled] for count in counts], dtype=torch.int32, device=device)
    out = torch.zeros(2, dtype=torch.int32, device=device)
    at = torch.zeros(16, dtype=torch.int32, device=device)
    power = 1 << (len(counts) - 1).bit_length()
    ask[(1,)](taken, out, at, len(counts), segments, PACK=PACK, CHUNK=100, CHUNKS_P2=power)
    count, taking = out.tolist()
    return count, taking, at.tolist()[: min(count, 16)]


@pytest.mark.parametrize(
    ("counts", "filled", "segments", "taking"),
    [
        ([0], 0, 6, 1),  # one leaves a result where there is nothing at all
        ([7], 0, 6, 4),  # a program for each step
        ([130], 0, 64, 64),
        ([20, 0, 66], 0, 64, 43),
        ([4], 5, 6, 5),  # results to join
        ([4], 40, 6, 6),
        ([130], 64, 64, 64),
    ],
)
def test_programs_are_no_more_than_their_steps_need(counts, filled, segments, taking, triton_device):
    assert asked(counts, filled, segments, triton_device)[:2] == (sum(counts), taking)


def test_entries_of_the_lists_of_all_chunks(triton_device):
    assert asked([2, 0, 3], 0, 6, triton_device)[2] == [0, 1, 200, 201, 202]
