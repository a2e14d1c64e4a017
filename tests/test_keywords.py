"""Which keywords a function takes is found behind wrappers that only hand them on."""

import functools

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from revlib.keywords import keywords_of


class Masked(nn.Module):
    def forward(self, x, mask=None):
        return x


class Normed(nn.Module):
    """As in many repositories: streams by position, everything else handed on."""

    def __init__(self, fn):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(4), fn

    def forward(self, x, **kwargs):
        return self.fn(self.norm(x), **kwargs)


class Scaled(Normed):
    def forward(self, x, scale=1.0, **kwargs):
        return scale * self.fn(x, **kwargs)


class Fixed(Normed):
    def forward(self, x, **kwargs):
        return self.fn(x, mask=None, **kwargs)


class Switched(Normed):
    def forward(self, *args, **kwargs):
        return self.fn(*args, **kwargs) if self.training else self.norm(*args, **kwargs)


class Helped(nn.Module):
    def forward(self, *args, **kwargs):
        return self.helper(*args, **kwargs)

    def helper(self, x, gain=None):
        return x


class Inherits(Masked):
    def forward(self, x, **kwargs):
        return super().forward(x, **kwargs)


class Reads(nn.Module):
    def forward(self, x, **kwargs):
        return x * kwargs["gain"]


class ReadsAndHandsOn(Normed):
    def forward(self, x, **kwargs):
        return self.fn(x, **kwargs) * kwargs.get("gain", 1.0)


class Itself(nn.Module):
    def forward(self, x, **kwargs):
        return self(x, **kwargs)


def closure(inner):
    def handed(*args, **kwargs):
        return inner(*args, **kwargs)

    return handed


def wrapped(inner):
    @functools.wraps(inner)
    def handed(*args, **kwargs):
        return inner(*args, **kwargs)

    return handed


CASES = {
    # what is called: the names, and whether it takes any other
    "names": (Masked(), {"mask"}, False),
    "none": (nn.Linear(4, 4), set(), False),
    "a norm before it": (Normed(Masked()), {"mask"}, False),
    "a norm before what takes none": (Normed(nn.Linear(4, 4)), set(), False),
    "a keyword of the wrapper": (Scaled(Masked()), {"scale", "mask"}, False),
    "a keyword that the wrapper sets": (Fixed(Masked()), set(), False),
    "one of two": (Switched(Masked()), {"mask"}, False),
    "a method": (Helped(), {"gain"}, False),
    "super": (Inherits(), {"mask"}, False),
    "wrappers around wrappers": (Normed(Scaled(Normed(Masked()))), {"scale", "mask"}, False),
    "reads": (Reads(), set(), True),
    "behind a wrapper it reads": (Normed(Reads()), set(), True),
    "reads and hands on": (ReadsAndHandsOn(Masked()), set(), True),
    "in a circle": (Itself(), set(), True),
    "a closure": (closure(Masked()), {"mask"}, False),
    "functools.wraps": (wrapped(Masked().forward), {"mask"}, False),
    "a partial": (functools.partial(Masked()), {"mask"}, False),
    "a partial that gives a stream": (functools.partial(lambda a, x, mask: x, 1), {"mask"}, False),
    "torch.compile": (torch.compile(Normed(Masked())), {"mask"}, False),
    "averaged": (AveragedModel(Masked()), {"mask"}, False),
    "data parallel": (nn.DataParallel(Normed(Masked())), {"mask"}, False),
    "a lambda, whose source is not read": (lambda *args, **kwargs: Masked()(*args, **kwargs), set(), True),
    "of torch": (torch.sin, set(), False),
}


@pytest.mark.parametrize("name", CASES)
def test_keywords_are_those_of_the_function_that_takes_them(name):
    called, names, every = CASES[name]
    found = keywords_of(called, 1)
    assert (set(found.names), found.every) == (names, every)


def test_a_wrapper_that_is_given_another_function():
    from revlib import ReversibleSequence

    x, wrapper = torch.randn(2, 4), Normed(nn.Linear(4, 4))
    seq = ReversibleSequence([(wrapper, Masked())])
    seq(x, x, mask=None)
    seen = []

    class Sees(Masked):
        def forward(self, x, mask=None):
            seen.append(mask)
            return x

    wrapper.fn = Sees()
    seq(x, x, mask="a mask")
    assert seen == ["a mask"]
