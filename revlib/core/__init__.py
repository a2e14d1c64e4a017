r"""The core: how one forward is recorded, and how its backward gets back what forward did not keep.

A stack of n steps has the states 0, ..., n, numbered like fence posts. Step k leads from state k to state k + 1: it
takes some of the streams away, reads others, and makes new ones. The step of a function and a coupling takes one, reads
the others, and makes one; a bijection takes streams and makes others, and reads none. Every stream of a pass has a
number, so that what stays from one state to the next is one stream::

    forward    state 0 --step 0--> state 1 --step 1--> ... --step n-1--> state n    (kept)
                       placeholders        placeholders

    backward   state 0 <--undo 0-- state 1 <--undo 1-- ... <--undo n-1-- state n
                       refilled            refilled

The graph is the one that plain autograd builds. Only what it saves is exchanged. The life of a pass, file by file:

1. ``plan``. A scheduler's plan says of each step whether autograd keeps what it saves, and which states and streams are
   kept. Under ``Reversible`` that is the last state and nothing else.
2. ``guard``. Whoever wants to watch the pass gives the core an object to call at fixed points. The core does not know
   what is watched.
3. ``saved_tensors``. While a step runs in forward, saved-tensor hooks put a *placeholder* into the graph for each
   tensor that autograd wants to save. When the step is over, the placeholders are empty.
4. ``record``. One record a step knows how to run the step again: its function, its context, and what kind of tensors
   its placeholders stood for. Running the function once on the recovered inputs gives two things: autograd saves the
   same tensors again, in the same order, which refill the placeholders; and ``unmerge`` of its result gives back the
   streams that the step had taken. Where the merge itself saves tensors, as a bijection does, it runs again on these.
5. ``tape``. In backward, autograd reaches step k, or asks one of its placeholders for its tensor. The tape finds the
   nearest state that it knows above, and undoes step by step down to state k. When the pass ends, it lets go of
   everything.

NOTE [ rules that all of this depends on ]

1. Key. What is recovered belongs to a *key*. In a pass that releases its graph as it goes, the key is ``SHARED``, and
   any later pass may use it. In a pass with ``retain_graph``, the key is the number of the pass, and what was recovered
   goes with it, also after an exception. Outside of a backward pass the number is -1.
2. Placeholder. It has three lives: the tensor itself, while its step runs in forward; nothing; the tensor that the
   repetition saved in its place. A tensor is given out only if its version is what it was when it was saved.
3. Position. Placeholders are refilled by position. Number, shape and dtype of what is saved must be those of forward.
4. First gradient. A step is recovered before any gradient enters its function, and not only when a tensor is asked
   for, since an optimizer may change a parameter inside backward. The hook for it sits on the graph's own node.
5. One at a time. With ``retain_graph`` the activations of one step are kept at a time, or memory would grow with depth.
6. Order. A kept state is exact, so it is preferred to a recovered one that is as near.
7. Alive. The graph owns placeholders, and through its hooks the tape. The tape knows placeholders by weak reference,
   and records by name. Records know modules, and a module may hold a tensor of the same graph. So the tape lets go of
   its records when nothing is left to recover, and neither records nor guards hold a tensor that requires a gradient.
8. Lock. Two threads may differentiate one graph. Whoever recovers holds the tape's lock.
"""

from revlib.core.guard import FirstRun, Guard, StepGuard, StepView
from revlib.core.plan import Plan
from revlib.core.record import StepRecord
from revlib.core.saved_tensors import SHARED, KeptStates, Key, Placeholder
from revlib.core.tape import Tape, surrounding_tape

__all__ = [
    "SHARED",
    "FirstRun",
    "Guard",
    "KeptStates",
    "Key",
    "Placeholder",
    "Plan",
    "StepGuard",
    "StepRecord",
    "StepView",
    "Tape",
    "surrounding_tape",
]
