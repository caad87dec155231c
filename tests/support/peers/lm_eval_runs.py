"""What lm-eval finds, as JSON on stdout: `python -m tests.support.peers.lm_eval_runs TASKS RUN…`, in a process of its
own.

TASKS is a directory of tasks besides those of examples/lm_eval. A RUN is JSON: `name`, `model`, `model_args`, `tasks`
and whatever else `simple_evaluate` takes. Written is `{name: {"metrics": {task: {metric: value}}, "samples": …}}`,
samples being {task: […]} with the log-likelihoods, or the text, of each document in turn.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager


def leaves(response: Any) -> list[Any]:
    """Numbers and texts of a response, however it is nested; whether a continuation is the greedy one counts too."""
    if isinstance(response, list | tuple):
        return [leaf for part in response for leaf in leaves(part)]
    return [response]


def main() -> None:
    tasks, *runs = sys.argv[1:]
    manager = TaskManager(include_path=["examples/lm_eval", tasks], include_defaults=False)
    found = {}
    for run in map(json.loads, runs):
        name = run.pop("name")
        report = simple_evaluate(**run, task_manager=manager, bootstrap_iters=0)
        if report is None:
            raise SystemExit("lm-eval returned nothing.")
        samples = {
            task: [leaves(row["resps"]) for row in sorted(rows, key=lambda row: row["doc_id"])]
            for task, rows in report["samples"].items()
        }
        metrics = {
            task: {key: value for key, value in values.items() if isinstance(value, float)}
            for task, values in report["results"].items()
        }
        found[name] = {"metrics": metrics, "samples": samples}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
