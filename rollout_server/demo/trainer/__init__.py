"""The GRPO trainer of the demo: a stranger to the server.

It talks HTTP through `trainer_client` and imports neither `rollout_server` nor `adapters`, so that what it recomputes
is evidence. Its modules import each other by relative paths only, so that `launch.py` can run this folder as a package
of its own.
"""
