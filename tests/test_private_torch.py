"""Each private interface of torch does on the installed version what revlib uses it for."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from revlib import _torch


def test_versions_count_edits_and_are_shared_by_views():
    t = torch.zeros(3)
    before = _torch.version_of(t)
    t[:2].add_(1)
    assert _torch.version_of(t) == before + 1 == _torch.versions_of([t, t[1:]])[1]
    with torch.inference_mode():
        frozen = torch.zeros(3)
    assert _torch.version_of(frozen) == -1 and _torch.versions_of([t, frozen]) == (before + 1, -1)


def test_views_know_their_base():
    t = torch.zeros(4)
    assert _torch.view_base(t[1:][:2]) is t and _torch.view_base(t) is t


def test_a_tensor_from_a_weak_reference_can_be_kept():
    t = torch.zeros(4)
    found = weakref.ref(t)()
    _torch.keep_alive(found)
    del t
    gc.collect()
    assert found.sum() == 0


def test_storages_have_numbers():
    t = torch.zeros(4)
    assert _torch.storage_id(t) == _torch.storage_id(t[2:]) != _torch.storage_id(t.clone())
    assert _torch.has_storage(t) and not _torch.has_storage(t.to_sparse())
    assert _torch.storage_id(t.to_sparse()) < 0


def test_fake_tensors_and_batch_norms_are_recognised():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        assert _torch.is_fake(torch.zeros(2)) and _torch.dispatch_modes_active()
        with _torch.no_dispatch_modes():
            assert not _torch.is_fake(torch.zeros(2)) and not _torch.dispatch_modes_active()
    assert mode and not _torch.is_fake(torch.zeros(2))
    norm = nn.BatchNorm1d(2)
    assert _torch.normalises(norm) and not _torch.normalises(norm.eval()) and not _torch.normalises(nn.LayerNorm(2))


@pytest.mark.parametrize("keep", [False, True])
def test_a_backward_pass_has_a_number_an_end_and_a_flag(keep):
    seen = []

    def look(gradient):
        seen.append((_torch.graph_task() >= 0, _torch.graph_is_kept()))
        _torch.at_end_of_backward(lambda: seen.append("end"))

    x = torch.ones(2, requires_grad=True)
    y = x * x
    y.register_hook(look)
    y.sum().backward(retain_graph=keep)
    assert seen == [(True, keep), "end"] and _torch.graph_task() == -1


def test_what_operations_leave_unwritten_is_found():
    packed = []

    def pack(t):
        packed.append([t])
        return packed[-1]

    with saved_tensors_hooks(pack, lambda held: held[0]):
        x = torch.randn(6, 2, 4, requires_grad=True)
        for training in (False, True):
            y = torch.nn.functional.rrelu(x * 2, training=training)
            assert not training or any(_torch.saved_unwritten(y.grad_fn) is held for held in packed)
        z = torch.nn.functional.rrelu_(x * 2, training=True)
        assert any(_torch.saved_unwritten(z.grad_fn) is held for held in packed)
        targets = torch.ones(2, 3, dtype=torch.long)
        c = torch.nn.functional.ctc_loss(x.log_softmax(-1), targets, (6, 6), (2, 2), reduction="none")
        found = _torch.saved_unwritten(c.grad_fn)
        assert any(found is held for held in packed) and found[0].shape[:2] == (2, 6)
        assert _torch.saved_unwritten((x * 2).grad_fn) is None


def test_what_an_operation_saves_is_read_without_calling_hooks():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x, None)
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    linear, x, runs = torch.nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True), []
    h = x.tanh()
    assert any(t is h for t in _torch.saved_by(linear(h).grad_fn))
    assert next(_torch.saved_by(Twice.apply(h).grad_fn)) is h

    def counted(t):
        runs.append(t)
        return linear(t.tanh())

    out = torch.utils.checkpoint.checkpoint(counted, x, use_reentrant=False)
    assert not any(isinstance(t, torch.Tensor) for t in _torch.saved_by(out.grad_fn)) and len(runs) == 1
    y = linear(h)
    y.sum().backward()
    assert set(_torch.saved_by(y.grad_fn)) == {None}, "it was freed"


def test_saved_tensor_hooks_are_seen():
    assert _torch.saved_tensor_hooks() is None and _torch.saved_tensor_hooks_allowed()
    pack = lambda t: t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, pack):
        assert _torch.saved_tensor_hooks()[0] is pack
    with torch.autograd.graph.disable_saved_tensors_hooks("no"):
        assert not _torch.saved_tensor_hooks_allowed()


def test_transforms_are_seen():
    def look(t):
        assert _torch.in_transform() and _torch.transforming() and _torch.is_transformed(t)
        assert _torch.transforms() == ["Grad", "Vmap"]
        assert not _torch.is_transformed(_torch.unwrapped(t))
        return t * 2

    torch.func.grad(lambda x: torch.func.vmap(look)(x).sum())(torch.ones(3))
    assert not _torch.in_transform() and not _torch.transforming() and _torch.transforms() == []
    with forward_ad.dual_level():
        assert _torch.forward_mode_active()
    assert not _torch.forward_mode_active()


def test_function_modes_can_be_exchanged():
    with torch.device("meta"):
        modes = _torch.function_modes()
        _torch.set_function_modes([])
        assert torch.zeros(1).device.type == "cpu"
        _torch.set_function_modes(modes)
        assert torch.zeros(1).device.type == "meta"
    assert _torch.function_modes() == []


def test_export_is_seen():
    seen = []

    class Look(nn.Module):
        def forward(self, x):
            seen.append(_torch.exporting())
            return x + 1

    torch.export.export(Look(), (torch.ones(2),))
    assert True in seen and not _torch.exporting()


def test_tracing_is_seen():
    seen = []

    def look(x):
        seen.append(_torch.tracing())
        return x + 1

    torch.jit.trace(look, torch.ones(2))
    assert True in seen and not _torch.tracing()


def test_a_function_that_bypasses_the_compiler_is_not_compiled():
    calls = []

    @_torch.bypass_compiler
    def hook(t):
        calls.append(torch.compiler.is_compiling())
        return t

    def fn(x):
        with torch.autograd.graph.saved_tensors_hooks(hook, hook):
            torch._dynamo.graph_break()
            return x.sin()

    x = torch.ones(2, requires_grad=True)
    torch.compile(fn, backend="eager")(x).sum().backward()
    assert calls and not any(calls)


def test_assertions_on_the_device():
    _torch.assert_on_device(torch.tensor(True), "never")
    with pytest.raises(RuntimeError, match="told"):
        _torch.assert_on_device(torch.tensor(False), "told")


def test_trees_and_wrappers():
    leaves, spec = _torch.tree_flatten({"a": [1, 2]})
    assert _torch.tree_unflatten(leaves, spec) == {"a": [1, 2]} == _torch.tree_map(int, {"a": [1, 2]})
    assert _torch.tree_leaves((1, [2])) == [1, 2] == leaves
    jagged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    assert _torch.is_traceable_wrapper_subclass(jagged) and issubclass(_torch.TorchDispatchMode, TorchDispatchMode)


def test_nothing_is_missing():
    assert _torch.missing() == ()


def test_an_error_of_those_who_forbid_hooks_is_recognised():
    def entering(forbidding):
        with pytest.raises(RuntimeError) as raised, saved_tensors_hooks(lambda t: t, lambda t: t):
            forbidding()
        return raised.value

    assert _torch.raised_by_forbidding_hooks(entering(lambda: torch.func.grad(torch.sin)(torch.tensor(1.0))))
    assert not _torch.raised_by_forbidding_hooks(entering(lambda: torch.ones(2) @ torch.ones(3)))


def test_wrappers_that_do_not_say_what_is_inside_are_recognised():
    class Opaque(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    class Logging(torch.Tensor):
        """With memory of its own."""

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    plain = torch.ones(2, 3)
    assert _torch.is_opaque_wrapper(Opaque(plain))
    assert not any(
        map(_torch.is_opaque_wrapper, (plain, nn.Parameter(plain), plain.as_subclass(Logging), torch.empty(2, 0)))
    )
