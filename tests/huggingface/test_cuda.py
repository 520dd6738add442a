"""On a CUDA device: the decode step is captured as a CUDA graph. Skipped elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import lamp_compile
from lamp_compile.runtime import kernel_notes
from tests.huggingface import reference
from tests.tolerances import ARITHMETIC, DEVICES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def on_device() -> Any:
    """The tiny Llama on the GPU."""
    return reference.build("Llama", "sdpa").cuda()


def test_eager_equals_the_cpu(on_device: Any, model: Any, ids: Tensor) -> None:
    fast = lamp_compile.compile(on_device, mode="eager", balance="never", floor=1)
    wanted = reference.logits(lamp_compile.compile(model, mode="eager", balance="never", floor=1), ids)
    assert reference.relative(reference.logits(fast, ids.cuda()).cpu(), wanted) < DEVICES.relative


def test_decoding_is_one_captured_graph(on_device: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    torch._dynamo.reset()
    counters.clear()
    fast = lamp_compile.compile(on_device)
    assert fast.lamp.mode == "reduce-overhead"
    wanted = lamp_compile.compile(on_device, mode="eager").generate(ids.cuda(), **greedy)
    agreement = [float((fast.generate(ids.cuda(), **greedy) == wanted).float().mean()) for _ in range(3)]
    assert min(agreement) > 0.95
    report = fast.lamp.report()
    assert "lamp.fused_attention" in report.after
    assert not [note for note in report.notes if note.startswith(kernel_notes.START)]
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_settings_act_on_the_captured_graph(on_device: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    torch._dynamo.reset()
    fast = lamp_compile.compile(on_device)
    shares = []
    for settings in ({"tau": 1e9}, {"tau": 0.0}, {"tau": 1e9, "floor": 1}):
        fast.lamp.controls.set(**settings)
        cache = fast.lamp.cache()
        fast.generate(ids.cuda(), past_key_values=cache, **greedy)
        shares.append(cache.guard_report()[0]["refined_share"])
    assert shares == [0.0, 1.0, 1.0]


def test_one_recording_serves_many_generations(on_device: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    """Though the user's own tensors take the memory that a generation freed."""
    torch._dynamo.reset()
    counters.clear()
    fast = lamp_compile.compile(on_device)
    addresses, others = set(), []
    for _ in range(6):
        out = fast.generate(ids.cuda(), return_dict_in_generate=True, **greedy)
        addresses.add(out.past_key_values.layers[0].k_high.data_ptr())
        del out
        others += [torch.empty(4096, dtype=torch.uint8, device="cuda") for _ in range(32)]
    assert len(addresses) == 1
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_a_long_prompt_goes_through_flash_attention() -> None:
    """Into an empty cache: logits are the original's, where planes would differ; and the planes are there."""
    model = reference.build("Llama", "sdpa").cuda().to(torch.bfloat16)
    ids = torch.randint(3, 128, (2, 200), generator=torch.Generator().manual_seed(1)).cuda()
    given = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "output_logits": True}
    fast = lamp_compile.compile(model, mode="eager", balance="never", tau=1e9)
    got, wanted = (one.generate(ids, return_dict_in_generate=True, **given).logits for one in (fast, model))
    errors = [reference.relative(one, two) for one, two in zip(got, wanted, strict=True)]
    assert errors[0] < ARITHMETIC[torch.bfloat16].relative * 2 < errors[1]


def test_a_prompt_into_a_new_cache_waits_for_nothing(on_device: Any, ids: Tensor) -> None:
    """A copy from the host for each layer once did: the device then waits for the host a layer at a time."""
    fast = lamp_compile.compile(on_device.to(torch.bfloat16), mode="eager")
    prompts = ids.cuda().repeat(1, 4)[:, :150]
    for mode in ("default", "error"):  # the first one compiles kernels
        cache = fast.lamp.cache(150)
        cache.unpadded = True
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            reference.logits(fast, prompts, past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert int(cache.get_seq_length()) == 150
