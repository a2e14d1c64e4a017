"""What commands of every kind use::

files.py      writes files that are whole or absent, whenever the program is killed
machine.py    the machine that something ran on: its device, its determinism, its name in the log
captured.py   training steps as CUDA graphs
"""
