"""The client runs where neither the server nor any array framework is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys

ALLOWED = {"trainer_client", "numpy", "httpx"}
# what these two need themselves
ALLOWED |= {"httpcore", "h11", "anyio", "idna", "certifi", "sniffio", "typing_extensions", "exceptiongroup"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in ALLOWED or top in sys.stdlib_module_names:
            return None
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import rollout_server
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the blocker does not block")

import numpy as np
from trainer_client import AsyncRolloutClient, RolloutClient
from trainer_client.verbs import publishing

with RolloutClient("http://127.0.0.1:9") as client:
    print(type(client).__name__)
tensors = {"q.lora_A.weight": np.zeros((2, 3), "f4"), "q.lora_B.weight": np.zeros((4, 2), "f4")}
print(publishing.push("policy", tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 4}).path)
"""


def test_imports_and_builds_a_push_with_only_its_two_packages() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["RolloutClient", "/v1/weights"]
