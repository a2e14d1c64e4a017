"""Parts of commands that measure something else than the benchmark does, or show what was measured::

differences.py   how far the curves of runs lie apart, for compare and parity
footprints.py    bytes of models that are never run, for simulate
jobs.py          all that wants a GPU, for gpu and report
figures.py       the pictures of the front page, for report
"""
