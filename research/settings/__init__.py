"""What the flags of commands are, and mean::

config.py       the settings of a training run, each of them a flag; recipes as such settings
flags.py        makes fields into flags, and checks their values
schedulers.py   schedulers by name, with a number
seed_flags.py   understands the flags of minREV's own command line
"""
