"""Self-attention that is computed by plain products where torch's fused kernel is slow."""

import pytest
import torch
from common import error, examples
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Attention
from torch import nn

from revlib.models import RevViT
from revlib.models import attention as module
from revlib.models.attention import LONGEST, SelfAttention


def calls_of_the_fused_kernel(monkeypatch, layer, x, **how):
    seen = []
    original = nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        seen.append(args)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", spy)
        layer(x, **how)
    return len(seen)


def test_plain_products_are_for_bfloat16_on_a_cpu(monkeypatch):
    layer, x = SelfAttention(16, 2, qkv_bias=True), torch.randn(2, 5, 16)
    assert calls_of_the_fused_kernel(monkeypatch, layer, x) == 1
    with torch.autocast("cpu", torch.float16):
        assert calls_of_the_fused_kernel(monkeypatch, layer, x) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert calls_of_the_fused_kernel(monkeypatch, layer, x) == 0
        with torch.no_grad():  # as in the repetition
            assert calls_of_the_fused_kernel(monkeypatch, layer, x) == 0
        assert calls_of_the_fused_kernel(monkeypatch, layer, x, is_causal=True) == 1
        assert calls_of_the_fused_kernel(monkeypatch, layer, torch.randn(1, LONGEST + 1, 16)) == 1
        layer.attn_drop.p = 0.5
        assert calls_of_the_fused_kernel(monkeypatch, layer, x) == 1
        assert calls_of_the_fused_kernel(monkeypatch, layer.eval(), x) == 0
    assert calls_of_the_fused_kernel(monkeypatch, layer.bfloat16(), x.bfloat16()) == 0


def gradients(layer, x):
    x = x.clone().requires_grad_()
    out = layer(x)
    out.float().sin().sum().backward()
    return [out.detach().float(), x.grad.float(), *(p.grad.float() for p in layer.parameters())]


@examples(20)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.sampled_from([1, 4, 16]), st.booleans())
def test_both_ways_are_one_function(batch, tokens, heads, features, biased):
    """In bfloat16, neither is further from the result in double precision than its rounding explains."""
    torch.manual_seed(0)
    exact = Attention(heads * features, heads, qkv_bias=biased).double()
    plain = SelfAttention(heads * features, heads, qkv_bias=biased).bfloat16()
    plain.load_state_dict(exact.state_dict())
    exact.load_state_dict(plain.state_dict())  # rounded
    x = torch.randn(batch, tokens, heads * features).bfloat16()
    assert error(gradients(plain, x), gradients(exact, x.double())) < 0.05


def test_in_double_precision_the_plain_way_has_the_gradients_of_timm(monkeypatch):
    torch.manual_seed(0)
    exact, plain = (kind(12, 3, qkv_bias=True).double() for kind in (Attention, SelfAttention))
    plain.load_state_dict(exact.state_dict())
    monkeypatch.setattr(SelfAttention, "_plain", lambda self, x: True)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    assert error(gradients(plain, x), gradients(exact, x)) < 1e-12


def test_it_is_timms_to_whoever_looks():
    attention = RevViT().blocks[0].F[1]
    assert isinstance(attention, Attention) and type(attention) is SelfAttention
    assert attention.state_dict().keys() == Attention(8, 2, qkv_bias=True).state_dict().keys()
    assert module.__all__ == ["SelfAttention"]


@pytest.mark.parametrize("training", [False, True])
def test_a_model_under_autocast_has_the_logits_of_single_precision(training):
    torch.manual_seed(0)
    model, images = RevViT(depth=2).train(training), torch.randn(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images)
    torch.testing.assert_close(low.float(), model(images), atol=0.02, rtol=0.05)
