"""nn.MultiheadAttention and nn.TransformerEncoderLayer: single nodes in a Dynamo graph, opened up and claimed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lamp_compile
from tests.passes.test_patterns import EXACT, close

LENGTH = 20
CAUSAL = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)
PADDING = torch.zeros(3, LENGTH, dtype=torch.bool)
PADDING[1, 15:] = True
PER_HEAD = CAUSAL.expand(12, -1, -1).contiguous()


def tokens(count: int = LENGTH) -> torch.Tensor:
    return torch.randn(3, count, 64, generator=torch.Generator().manual_seed(count))


class Attention(nn.Module):
    def __init__(self, **kwargs) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(64, 4, **kwargs)

    def forward(self, q, k, v, **kwargs):
        return self.attn(q, k, v, **kwargs)[0]


def compiled(model: nn.Module, *args, grad: bool = True, **kwargs):
    torch._dynamo.reset()
    model.eval()
    backend = lamp_compile.backend(lower="eager", **EXACT)
    with torch.set_grad_enabled(grad):
        return torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs), backend.reports[0]


SELF = {
    "plain": {},
    "weights asked for, not used": {"need_weights": True},
    "padding": {"key_padding_mask": PADDING},
    "mask": {"attn_mask": CAUSAL},
    "float mask": {"attn_mask": torch.zeros(LENGTH, LENGTH).masked_fill(CAUSAL, float("-inf"))},
    "mask per head": {"attn_mask": PER_HEAD},
    "padding and mask": {"key_padding_mask": PADDING, "attn_mask": CAUSAL},
}


@pytest.mark.parametrize("name", SELF)
@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention(name, batch_first):
    x = tokens() if batch_first else tokens().transpose(0, 1)
    kwargs = {"need_weights": False, **SELF[name]}
    model = Attention(batch_first=batch_first)
    out, report = compiled(model, x, x, x, **kwargs)
    assert report.rewritten == ("attn",)
    assert not report.refusals
    close(out, model(x, x, x, **kwargs))


@pytest.mark.parametrize("kwargs", [{}, {"bias": False}, {"kdim": 32, "vdim": 48}], ids=str)
def test_cross_attention(kwargs):
    model = Attention(batch_first=True, **kwargs)
    memory = tokens(11)
    args = (tokens(), memory[..., : kwargs.get("kdim", 64)], memory[..., : kwargs.get("vdim", 64)])
    out, report = compiled(model, *args, need_weights=False)
    assert report.rewritten == ("attn",)
    close(out, model(*args, need_weights=False))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    "mask", [{}, {"src_key_padding_mask": PADDING}, {"mask": CAUSAL}], ids=["plain", "padding", "mask"]
)
def test_fused_encoder_layer(norm_first, mask):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        64, 4, 96, batch_first=True, norm_first=norm_first, activation="gelu" if norm_first else "relu"
    )
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = tokens()
    out, report = compiled(model, x, grad=False, **mask)
    assert report.rewritten == ("layers.0", "layers.1")
    with torch.no_grad():
        close(out, model(x, **mask))


def test_encoder_layer_with_gradients_on_takes_the_other_path():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).eval()
    out, report = compiled(model, tokens())
    assert report.rewritten == ("self_attn",)
    close(out, model(tokens()))


@pytest.mark.parametrize(
    ("kwargs", "reason"), [({"add_bias_kv": True}, "add_bias_kv"), ({"add_zero_attn": True}, "add_zero_attn")]
)
def test_odd_options_are_refused(kwargs, reason):
    model, x = Attention(batch_first=True, **kwargs), tokens()
    out, report = compiled(model, x, x, x, need_weights=False)
    assert report.rewritten == ()
    assert reason in report.refusals[0].reason
    assert torch.equal(out, model(x, x, x, need_weights=False))


def test_used_weights_are_refused():
    class Both(Attention):
        def forward(self, x):
            out, weights = self.attn(x, x, x)
            return out, weights

    (out, weights), report = compiled(Both(batch_first=True), tokens())
    assert "weights are used" in report.refusals[0].reason
    assert out.shape == (3, LENGTH, 64)
    assert weights.shape == (3, LENGTH, LENGTH)
