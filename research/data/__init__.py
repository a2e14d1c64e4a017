"""Images on their way into a network::

readers.py    reads data sets by name
split.py      a data set in memory, as two tensors
batches.py    shuffles, normalises and mixes
augment.py    augments on the device
"""
