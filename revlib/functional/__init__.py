"""The second engine: a whole stack as one ``autograd.Function``, without saved-tensor hooks.

Why there are two. The first engine (:mod:`revlib.engine`) leaves autograd's graph as it is and only replaces what the
graph saves, so everything that autograd can do works: hooks, closures, partial gradients, any state of modules that can
be put back. But it lives on saved-tensor hooks, which ``torch.func`` transforms refuse and the compiler does not trace.
This engine goes through both, at the price that functions must be pure: all that they read must be an argument.

When each is used: the scheduler ``Functional()`` uses this one, every other scheduler the first.

==================  ================================================================================
pure_stack          a stack as a pure function of tensors: streams, and whatever else its functions read
vjp                 its backward as a pure function: undo the steps, last first, and differentiate each
autograd_function   both as one ``autograd.Function``, with its double backward
purity              noticing what a function may not do where it must be pure
==================  ================================================================================
"""

from revlib.functional.autograd_function import run

__all__ = ["run"]
