"""Reinforcement learning with checkable rewards (DeepSeek-R1, Kimi 1.5), small enough for a laptop.

Reading order: tasks, objectives, rollout, train, scaling; cli has the commands `lm reason ...`.
"""
