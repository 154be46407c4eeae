"""Agents that act over several turns: GiGPO, its episodes and environments."""
