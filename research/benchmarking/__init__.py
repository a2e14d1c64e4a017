"""What python -m research.benchmark is made of::

contenders.py    what it compares
libraries.py     blocks of other libraries
instruments.py   counts bytes and seconds of a step
points.py        what it finds, as a record and a table
pareto.py        its plots
"""
