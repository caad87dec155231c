"""The commands of `rollout-server`, a module for each; `cli.py` lists them.

A module imports what is heavy inside its command, so that `--help` starts at once and what only talks to a server
starts without mlx.
"""
