"""Images on their way into a network::

readers.py    reads data sets by name
folders.py    images of one's own: which of them are for testing, and whether they are held in memory
split.py      a data set in memory, as two tensors
streamed.py   images that stay on disk, decoded by worker processes whenever their turn comes
decoding.py   image files to tensors, and what to do with those that cannot be read
batches.py    normalises, mixes, and shows progress
augment.py    crops, flips, RandAugment, mixup and cutmix
"""
