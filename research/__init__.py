"""Scripts on top of revlib's public API. Each file here is a command: ``python -m research.NAME --help``.

Training::

    train.py          trains on digits, CIFAR-10, Fashion-MNIST or images of your own
    predict.py        names the classes that a trained network gives to images
    compare.py        lays runs over one another
    parity.py         trains under every scheduler, on several seeds
    finetune.py       converts a trained network, and fine-tunes it

Measuring::

    benchmark.py      memory and time of stacks of blocks
    drift.py          how accurately inversion works
    simulate.py       sizes models without the hardware
    gpu.py            runs everything that wants a GPU
    host_time.py      what a step costs the host, by scheduler and by guard
    step_time.py      what a training step of a recipe takes
    trace.py          how much of revlib's code one training step runs

Documentation::

    tutorial.py       the lesson: reversible training from scratch; opens as a notebook
    report.py         renders all results into one page
    reference.py      builds the reference from docstrings

Each folder holds the parts of commands, and says in its own docstring what its files are for. A folder imports from
those above it in this list only, and no command imports another::

    shared/           files that are whole or absent, the machine, captured steps
    data/             reads images, shuffles, augments and normalises them
    recipes/          whole runs, as values
    settings/         flags, and what they mean
    training/         networks, checkpoints, logs, and the loop that uses them
    benchmarking/     what the benchmark compares, its instruments, its tables and plots
    studies/          parts of the other commands that measure
"""
