"""A pre-norm encoder layer of torch's, taken apart: the two functions add up to the layer, and stack reversibly."""

from pathlib import Path

import pytest
import torch
from common import error, leaves, loss
from torch import nn
from torch.nn import functional as F

from revlib import Naive, Reversible, ReversibleSequence
from revlib.convert import encoder_pair

MASKS = {
    "none": {},
    "causal": {"src_mask": nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64), "is_causal": True},
    "padding": {"src_key_padding_mask": torch.tensor([[False] * 4 + [True], [False] * 5])},
}


def layer(activation=F.gelu, **options):
    return nn.TransformerEncoderLayer(8, 2, 16, 0.2, activation, norm_first=True, **options).double()


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{"batch_first": True}, {"activation": nn.ReLU(), "bias": False}], ids=str)
def test_the_two_functions_and_their_additions_are_the_layer(options, training, masks):
    whole = layer(**options).train(training)
    f, g = encoder_pair(whole)
    (x,) = leaves(2, 5, 8, count=1)
    x = x if whole.self_attn.batch_first else x.transpose(0, 1)
    torch.manual_seed(0)
    want = whole(x, **masks)
    torch.manual_seed(0)
    h = x + f(x, **masks)
    assert error(h + g(h), want) < 1e-12
    assert {id(p) for m in (f, g) for p in m.parameters()} == {id(p) for p in whole.parameters()}


def test_stacks_of_them_neither_grow_nor_lose_their_inputs():
    torch.manual_seed(0)
    layers = [layer(batch_first=True).float() for _ in range(12)]
    x, mask = torch.randn(2, 5, 8, requires_grad=True), MASKS["causal"]["src_mask"].float()
    found = []
    for scheduler in (Naive(), Reversible()):
        torch.manual_seed(1)
        stack = ReversibleSequence([encoder_pair(a) for a in layers], scheduler=scheduler)
        outputs = stack(x, x, src_mask=mask)
        loss(outputs).backward()
        found.append([x.grad.clone(), *(p.grad.clone() for p in stack.parameters())])
        assert max(y.std() for y in outputs) < 4 * x.std()
        x.grad = None
        stack.zero_grad()
    assert error(*found) < 1e-4


@pytest.mark.parametrize("whole", [True, False])
def test_the_error_names_a_residual_connection_inside_and_only_there(whole):
    torch.manual_seed(0)
    layers = [layer(batch_first=True).float() for _ in range(24)]
    pairs = zip(layers[::2], layers[1::2], strict=True) if whole else map(encoder_pair, layers[:12])
    stack = ReversibleSequence(pairs, scheduler=Reversible(tolerance=None if whole else 1e-9))
    x = torch.randn(2, 5, 8)
    with pytest.raises(RuntimeError, match=r"'When backward refuses' in the guide, revlib/README\.md") as refused:
        loss(stack(x, x)).backward()
    assert ("An existing residual block" in str(refused.value)) is whole


def test_the_sections_that_errors_name_are_in_the_guide():
    headings = (Path(__file__).parent.parent / "revlib" / "README.md").read_text().splitlines()
    assert {"## When backward refuses", "## An existing residual block"} <= set(headings)


def test_what_cannot_be_taken_apart_is_refused():
    with pytest.raises(TypeError, match=r"takes an nn.TransformerEncoderLayer, got Linear"):
        encoder_pair(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"pre-norm layer, got norm_first=False"):
        encoder_pair(nn.TransformerEncoderLayer(8, 2))

    class Own(nn.TransformerEncoderLayer):
        def forward(self, x):
            return x

    with pytest.raises(TypeError, match="got Own"):
        encoder_pair(Own(8, 2, norm_first=True))


def test_what_is_no_layer_at_all():
    with pytest.raises(TypeError, match=r"encoder_pair takes an nn\.TransformerEncoderLayer, got str"):
        encoder_pair("layer")
