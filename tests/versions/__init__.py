"""Environments with other versions than constraints.txt: see the files beside this one.

python -m tests.versions tests/versions/lowest.txt prints what to install in that one.
"""
