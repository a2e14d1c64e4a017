"""Scripts on top of revlib's public API, each a command: ``python -m research.NAME --help``.

Training::

    train.py          trains on digits, CIFAR-10, Fashion-MNIST or images of your own
    config.py         its settings, each of them a flag; flags.py makes fields into flags
    recipes/          whole runs, as values
    data.py           reads data sets; batches.py shuffles them, augment.py augments on the device
    seed_flags.py     understands the flags of minREV's own command line
    schedulers.py     schedulers by name, with a number
    networks.py       the networks, couplings and schedulers that flags name; build.py puts a run together
    checkpoint.py     continues a run bit for bit; captured.py captures its steps as CUDA graphs
    distributed.py    puts it on several processes
    log.py            one line an epoch; tracking.py tells TensorBoard and Weights & Biases, plots.py draws curves
    compare.py        lays runs over one another
    parity.py         trains under every scheduler, on several seeds
    finetune.py       converts a trained network, and fine-tunes it

Measuring::

    benchmark.py      memory and time of stacks of blocks; contenders.py are what it compares, libraries.py other
                      libraries' blocks, points.py what it finds, pareto.py its plots
    instruments.py    counts bytes and seconds of a step
    drift.py          how accurately inversion works
    simulate.py       sizes models without the hardware, by footprints.py
    gpu.py            runs everything that wants a GPU
    host_time.py      what a step costs the host, by scheduler and by guard
    step_time.py      what a training step of the recipe takes
    trace.py          how much of revlib's code one training step runs
    machine.py        the machine that something ran on; files.py writes files that are whole or absent

Documentation::

    tutorial.py       the lesson: reversible training from scratch; opens as a notebook
    report.py         renders all results into one page; figures.py draws the pictures of the front page
    reference.py      builds the reference from docstrings
"""
