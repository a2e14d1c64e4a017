"""Processes, threads and interruptions."""

import contextlib
import copy
import gc
import io
import multiprocessing
import pickle
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from common import Lambda, grads, leaves, loss, mlp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from situations.base import Setting, everything, situation, train


# ---------------------------------------------------------------------------------------------- interruptions
@contextlib.contextmanager
def nothing_left():
    """No tensor made within is alive afterwards."""
    gc.freeze()
    try:
        yield
        torch.ones((), requires_grad=True).square().backward()  # autograd holds what it had queued, until its next pass
        gc.collect()
        assert not any(isinstance(t, torch.Tensor) for t in gc.get_objects())
    finally:
        gc.unfreeze()


class Interrupting(torch.autograd.Function):
    """Passes its input on, and is interrupted in backward, where plain autograd can be too."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        signal.raise_signal(signal.SIGINT)
        return g


@contextlib.contextmanager
def interruptible():
    """Ctrl-C raises KeyboardInterrupt within, also where whoever started Python has it ignored, as shells do with jobs
    in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@situation("KeyboardInterrupt in backward; then training goes on")
def keyboard_interrupt(setting: Setting):
    stack = setting.stack(lambda: mlp(dropout=0.2))
    raised = False
    with nothing_left(), interruptible():
        x1, x2 = leaves()
        try:
            loss(stack(Interrupting.apply(x1 * 1), x2)).backward()
        except KeyboardInterrupt:
            raised = True
        stack.zero_grad()
        del x1, x2
    assert raised
    return train(stack)


class Moody(nn.Module):
    """Raises what it is told to, once, when it runs in backward."""

    def __init__(self, raises):
        super().__init__()
        self.inner = mlp(dropout=0.2)
        self.left, self.take = raises.__len__, raises.pop  # a repetition puts back the lists that it can see

    def forward(self, x):
        if torch._C._current_graph_task_id() != -1 and self.left():
            raise self.take()
        return self.inner(x)


def raising_once(setting: Setting, error: BaseException):
    raises = [error]
    stack = setting.stack(lambda: Moody(raises))
    with nothing_left():
        try:
            loss(stack(*leaves())).backward()
        except type(error):
            assert not raises
            error.__traceback__ = None  # which holds the frames of all that ran
        stack.zero_grad()
    raises.clear()
    return train(stack)


@situation("KeyboardInterrupt in the recomputation; then training goes on")
def interrupted_recomputation(setting: Setting):
    return raising_once(setting, KeyboardInterrupt())


@situation("a function's own error in the recomputation; then training goes on")
def error_in_recomputation(setting: Setting):
    return raising_once(setting, ArithmeticError("the user's own"))


class LittleMemory(TorchDispatchMode):
    """A device that cannot hold a matrix of more than so many elements, in backward."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, torch.Tensor)]
        matrices = [t for t in made if t.ndim == 2 and t.shape[-1] in (4, 8)]  # streams and hidden layers
        if torch._C._current_graph_task_id() != -1 and any(t.numel() > self.most for t in matrices):
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        return result


@situation("out of memory in backward; then a smaller batch")
def out_of_memory(setting: Setting):
    stack, found, batch = setting.stack(lambda: mlp(dropout=0.2)), [], 32
    while not found:
        with nothing_left() if batch == 32 else contextlib.nullcontext():
            xs = leaves(batch, 4)
            try:
                with LittleMemory(8 * 8):
                    loss(stack(*xs)).backward()
                found = grads(*xs, stack)
            except torch.OutOfMemoryError:
                stack.zero_grad()
                batch //= 2
            del xs
    return [batch, found, train(stack)]


@situation("out of memory in the recomputation; then a smaller batch")
def out_of_memory_recomputing(setting: Setting):
    return raising_once(setting, torch.OutOfMemoryError("tried to allocate more than there is"))


@situation("out of memory in forward; then a smaller batch")
def out_of_memory_in_forward(setting: Setting):
    def limited(m, x):
        if len(x) > 4:
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        return m(x)

    stack = setting.sequence((mlp(), mlp()), (mlp(), Lambda(limited, mlp())))
    with nothing_left(), contextlib.suppress(torch.OutOfMemoryError):
        stack(*leaves(8, 4))
    return train(stack)


@situation("a forward without a backward, a hundred times", only="Additive()")
def forwards_only(setting: Setting):
    stack = setting.stack(depth=1)
    with nothing_left():
        for _ in range(100):
            outputs = stack(*leaves())
        del outputs
    return train(stack)


def resident() -> int:
    """Kilobytes of memory that the process has."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


# The rounding of 10,000 steps of training, which each step feeds to the next.
@situation("10,000 steps of training without growth", only="Additive()", tolerance=1e-6, slow=True)
def ten_thousand_steps(setting: Setting):
    stack = setting.stack(lambda: mlp(dropout=0.2), depth=1)
    optimizer, sizes = torch.optim.SGD(stack.parameters(), lr=1e-4), []
    for i in range(10_000):
        optimizer.zero_grad()
        loss(stack(*(x.detach() for x in leaves()))).backward()
        optimizer.step()
        if i % 1000 == 999:
            gc.collect()
            sizes.append((sum(isinstance(t, torch.Tensor) for t in gc.get_objects()), resident()))
    assert len({tensors for tensors, _ in sizes}) == 1, f"tensors and kB after each 1,000 steps: {sizes}"
    assert sizes[-1][1] - sizes[0][1] < 2000, f"tensors and kB after each 1,000 steps: {sizes}"
    return everything(stack)


# ---------------------------------------------------------------------------------------------- copies
@situation("pickled and unpickled, saved and loaded")
def pickled(setting: Setting):
    stack = setting.stack()
    found = train(stack)
    file = io.BytesIO()
    torch.save(stack, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.scheduler == stack.scheduler and loaded.coupling == stack.coupling
    return [found, train(pickle.loads(pickle.dumps(stack))), train(loaded)]


@situation("pickled and copied in between forward and backward")
def pickled_in_between(setting: Setting):
    stack, xs = setting.stack(lambda: mlp(dropout=0.2)), leaves()
    total = loss(stack(*xs))
    twins = [copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))]
    total.backward()
    return [*grads(*xs, stack), *(train(twin) for twin in twins)]


@situation("parameters in shared memory, as for Hogwild")
def shared_memory(setting: Setting):
    return train(setting.stack().share_memory())


# ---------------------------------------------------------------------------------------------- threads
# Under Functional a thread that reads the parameters may find those to which another one is bound.
@situation("threads that share a stack", without="Functional()")
def threads(setting: Setting):
    stack, batches = setting.stack(), [leaves(5, 4) for _ in range(4)]

    def work(xs):
        return [torch.autograd.grad(loss(stack(*xs)), [*xs, *stack.parameters()]) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(work, batches))


@situation("threads that differentiate one graph")
def threads_on_a_graph(setting: Setting):
    stack, xs = setting.stack(lambda: mlp(dropout=0.3), depth=4), leaves()
    total = loss(stack(*xs))
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(lambda _: torch.autograd.grad(total, xs, retain_graph=True), range(15)))


@situation("a forward in one thread while another goes backward")
def forward_beside_backward(setting: Setting):
    stack, xs, found = setting.stack(), leaves(), []
    others = [leaves() for _ in range(5)]
    total = loss(stack(*xs))
    thread = threading.Thread(target=lambda: found.extend(loss(stack(*ys)).detach() for ys in others))
    thread.start()
    total.backward()
    thread.join()
    return [*found, *grads(*xs, stack)]


# ---------------------------------------------------------------------------------------------- processes
class Trained(Dataset):
    """Samples that a model makes: of its outputs and gradients, in whichever process it runs."""

    def __init__(self, stack) -> None:
        self.stack = stack

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i):
        torch.manual_seed(i)
        torch.set_num_threads(1)
        with torch.enable_grad():
            xs = leaves()
            outputs = self.stack(*xs)
            return torch.stack([t.detach() for t in (*outputs, *torch.autograd.grad(loss(outputs), xs))])


def loaded(setting: Setting, context: str):
    stack = setting.stack(depth=1)
    loss(stack(*leaves())).backward()  # the parent's autograd threads and ledgers exist before it forks
    loader = DataLoader(Trained(stack), batch_size=None, num_workers=1, multiprocessing_context=context)
    return [*loader, *grads(stack)]


@situation("workers of a DataLoader that run the model: fork", only="Additive()")
def forked_workers(setting: Setting):
    return loaded(setting, "fork")


@situation("workers of a DataLoader that run the model: spawn", only="Additive()", slow=True)
def spawned_workers(setting: Setting):
    return loaded(setting, "spawn")


def train_elsewhere(stack, results) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(5)
    results.put([t.detach().numpy() for t in train(stack) if t is not None])


@situation("a model sent to a spawned process, and trained there", only="Additive()", slow=True)
def spawned(setting: Setting):
    processes = multiprocessing.get_context("spawn")
    results = processes.Queue()
    stack = setting.stack().double()
    worker = processes.Process(target=train_elsewhere, args=(stack, results))
    worker.start()
    found = results.get(timeout=120)
    worker.join()
    return [torch.from_numpy(t) for t in found]
