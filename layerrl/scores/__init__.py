"""Ways to score layers, one file each, and what those that generate have in common.

A method is a module with a `METHOD`; `METHODS` in `layerrl/probe.py` names it.
"""
