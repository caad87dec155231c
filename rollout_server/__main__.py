"""`python -m rollout_server` is `rollout-server`."""

from rollout_server.cli import main

if __name__ == "__main__":
    main()
