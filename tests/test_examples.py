"""The examples, at toy size: each runs, learns, and has the memory that it says."""

import math
import re
from pathlib import Path

import pytest
import torch
from torchvision import datasets
from torchvision.transforms import functional as tf

from research.examples import adapters, experts, footprints, language_model, loops, revnet, unet
from revlib import Naive, Reversible
from revlib.testing import assert_memory_flat, assert_same_gradients

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_every_example_has_at_most_a_hundred_lines():
    for path in (ROOT / "research" / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 100, path.name


def test_revnet_trains_and_inverts():
    model = revnet.RevNet(width=8, depths=(1, 1))
    fake = datasets.FakeData(16, (3, 16, 16), 10, transform=tf.to_tensor)
    assert 0 <= revnet.train(model, fake, fake, epochs=1, batch=8) <= 1
    x = torch.randn(2, 3, 16, 16)
    assert model(x).shape == (2, 10)
    features = model.stem(x)
    assert torch.allclose(model.stages.inverse(*model.stages(features))[0], features, atol=1e-3)


def test_revnet_has_the_gradients_of_naive():
    stages = revnet.ReversibleSequence(revnet.items(8, (1, 2))).double()
    assert_same_gradients(stages, torch.randn(2, 8, 8, 8, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dims", [2, 3])
def test_the_u_net_has_the_gradients_of_naive(dims):
    body = revnet.ReversibleSequence(unet.items(4, 1, 2, dims)).double()
    x = torch.randn(2, 4, *[8] * dims, dtype=torch.float64, requires_grad=True)
    assert [y.shape for y in body(x)] == [x.shape]
    assert_same_gradients(body, x)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_u_net_denoises(dims):
    losses = unet.train(unet.UNet(1, 8, 1, 1, dims), dims, steps=60, size=16 if dims == 2 else 8)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_the_language_model_learns_and_writes_from_its_cache():
    model = language_model.LanguageModel(context=32, width=32, heads=2, depth=2)
    assert language_model.train(model, 80, 8, rate=1e-2) < 0.6 * math.log(256)
    tokens = torch.tensor([list(b"The statement")])
    cache: dict = {}
    with torch.no_grad():
        one_by_one = torch.cat([model(tokens[:, i : i + 1], cache) for i in range(tokens.shape[1])], 1)
        assert torch.allclose(one_by_one, model(tokens), atol=1e-4)
    text = model.generate(b"The ")
    assert len(text) == 32 and text.startswith(b"The ")


def test_the_language_model_takes_less_than_the_plain_one():
    model = language_model.LanguageModel(context=256, width=32, heads=2, depth=8)
    plain, reversible = (language_model.peak(model, scheduler, 1) for scheduler in (Naive(), Reversible()))
    assert plain > 2.5 * reversible


def test_the_experts_are_routed_as_in_forward_and_balanced():
    blocks = experts.stack(positions=4, width=8, depth=2)
    x = torch.randn(3, 4, 8, requires_grad=True)
    assert_same_gradients(blocks, torch.zeros((), dtype=torch.float64), x, x, rtol=1e-6)
    first, last = experts.train(experts.stack(positions=4, width=8, depth=2), 60, 4, 8)
    assert last < 0.95 * first


def test_memory_of_the_experts_is_flat():
    x = torch.randn(64, 8, 32, requires_grad=True)
    make = lambda depth: experts.stack(depth=depth)  # noqa: E731
    assert_memory_flat(make, torch.zeros((), dtype=torch.float64), x, x, depths=(2, 6), rtol=0.05)


@pytest.mark.slow
def test_adapters_learn_on_a_frozen_base():
    pytest.importorskip("sklearn")
    base, tuned = adapters.main(epochs=15, depth=2)
    assert base > 0.85 and tuned > 0.7
    model = adapters.RevViT(img_size=8, patch_size=2, in_chans=1, num_classes=5, embed_dim=16, depth=2, num_heads=2)
    adapters.adapt(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapters.train(model, *adapters.digits(range(5, 10)), epochs=1)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".up." in name or ".down." in name for name in changed)


@pytest.mark.parametrize("library", ["lightning", "accelerate"])
def test_loops(library):
    pytest.importorskip(library)
    assert getattr(loops, library)(epochs=4) > 0.9


def test_footprints_are_flat_in_depth_and_at_borders(tmp_path):
    footprints.main(tmp_path, "1,4", size=32, width=16, batch=2)
    check((tmp_path / "footprints.md").read_text())


def test_the_committed_footprints_say_so_too():
    check((ROOT / "research" / "results" / "examples" / "footprints.md").read_text())


def check(page):
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    numbers = {(row[0], row[1]): [float(cell) for cell in row[2:]] for row in rows[1:]}
    assert re.search(r"`python -m research\.examples\.footprints --out .*`", page) and len(numbers) == 12
    for network in ("RevNet", "U-Net", "U-Net, 3-D"):
        held, peak = {}, {}
        for way in footprints.WAYS:
            found = numbers[network, way]
            held[way], peak[way] = found[: len(found) // 2], found[len(found) // 2 :]
        ours = held["one sequence"], peak["one sequence"]
        assert all(last < 1.15 * first + 0.3 for first, *_, last in ours)
        assert max(ours[0]) < 0.5 * min(held["a stack a stage"]) and max(ours[1]) < min(peak["a stack a stage"])
        assert ours[1][-1] < 0.5 * peak["torch's checkpoint"][-1] < 0.3 * peak["plain"][-1]
