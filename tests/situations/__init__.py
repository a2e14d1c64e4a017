"""The situation matrix: every situation under every scheduler and coupling, against plain autograd by hand.

Each situation is one function, written as a user would write it; ``table.csv`` says what must come of it, and
``elsewhere.csv`` what other tests say. From the root of the repository,

    PYTHONPATH=.:tests python -m situations           writes README.md in this folder out of both,
    PYTHONPATH=.:tests python -m situations --play    first plays the situations that the table does not have yet.
"""

from situations import context, differentiation, functions, kinds, learning, processes, refusals, shapes, surroundings
from situations.base import SITUATIONS

THEMES = {
    learning: "Training, parameters and optimizers",
    differentiation: "Ways to differentiate",
    functions: "What functions do",
    context: "Context and captured tensors",
    kinds: "Kinds of streams",
    shapes: "Shapes and numbers of streams that change",
    surroundings: "Modes and contexts around",
    refusals: "Changes between forward and backward, and misuse",
    processes: "Processes, threads and interruptions",
}

__all__ = ["SITUATIONS", "THEMES"]
