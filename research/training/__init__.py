"""What a training run is made of::

loop.py          the run: epochs of steps, tests, lines of the log, checkpoints
networks.py      the networks and couplings that flags name
build.py         puts network, optimizer, schedule and the average of the weights together
inputs.py        what a network is trained on: classes, sizes, normalisation, split
trained.py       a network from its checkpoint, ready to predict
checkpoint.py    continues a run bit for bit
distributed.py   puts it on several processes
log.py           one line an epoch
tracking.py      tells TensorBoard and Weights & Biases
plots.py         draws the curves of runs
"""
