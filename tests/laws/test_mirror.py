"""Where the test of a module is: in the file of its own name, or in the one that `ELSEWHERE` names."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

from tests.laws.test_house import nodes_of
from tests.laws.test_house import trees as trees
from tests.laws.test_rooms import ROOT, imported, modules

SOURCES = ("rollout_server", "adapters", "trainer_client")
LEAST_LINES = 140
"""A module of so many lines has a test that is found; shorter ones are held by the tests of what they are part of."""
LOADER = "rollout_server.engine.model.load"
"""What imports a family's classes, by the name that a model has in its config.json."""

# The file that holds a module which has no test of its own name, chosen by reading and by which lines it runs.
ELSEWHERE = {
    "adapters/bundle.py": "tests/trainer_client/adapter/test_digest.py",
    "adapters/kernels/low_rank.py": "tests/adapters/kernels/test_decode.py",
    "adapters/resident/layers/slot_stack.py": "tests/adapters/resident/layers/test_linear.py",
    "adapters/resident/model_layers.py": "tests/adapters/resident/test_parameter_sets.py",
    "adapters/resident/residency.py": "tests/engine/policies/test_parameter_sets.py",
    "adapters/resident/staging.py": "tests/engine/policies/test_staging.py",
    "rollout_server/commands/serve.py": "tests/test_cli.py",
    "rollout_server/commands/terminal/command_options.py": "tests/test_cli.py",
    "rollout_server/engine/assembly.py": "tests/engine/batch/test_length_buckets.py",
    "rollout_server/engine/batch/batches.py": "tests/engine/batch/test_length_buckets.py",
    "rollout_server/engine/batch/decoder.py": "tests/engine/batch/test_batch.py",
    "rollout_server/engine/kv_cache/mlx_caches.py": "tests/engine/model/test_recurrent_kinds.py",
    "rollout_server/engine/kv_cache/padded.py": "tests/engine/batch/test_batch.py",
    "rollout_server/engine/loop.py": "tests/engine/test_handle.py",
    "rollout_server/engine/messages/control.py": "tests/fleet/codec/test_frames.py",
    "rollout_server/engine/messages/rollouts.py": "tests/fleet/codec/test_frames.py",
    "rollout_server/engine/messages/scoring.py": "tests/fleet/codec/test_frames.py",
    "rollout_server/engine/messages/status.py": "tests/engine/requests/test_token_gaps.py",
    "rollout_server/engine/messages/versions.py": "tests/fleet/codec/test_frames.py",
    "rollout_server/engine/model/attention/source.py": "tests/engine/model/attention/test_kernel.py",
    "rollout_server/engine/model/checkpoint/corrections/rope.py": "tests/engine/model/checkpoint/test_config_meaning.py",  # noqa: E501
    "rollout_server/engine/model/checkpoint/effects.py": "tests/engine/model/checkpoint/test_config_coverage.py",
    "rollout_server/engine/model/checkpoint/files.py": "tests/engine/model/test_load.py",
    "rollout_server/engine/model/checkpoint/meaning.py": "tests/engine/model/checkpoint/test_config_meaning.py",
    "rollout_server/engine/scheduling/admission.py": "tests/engine/requests/test_wait_s.py",
    "rollout_server/engine/scoring/batched.py": "tests/engine/scoring/test_reader.py",
    "rollout_server/engine/scoring/job.py": "tests/engine/test_handle.py",
    "rollout_server/engine/scoring/queue.py": "tests/engine/scoring/test_reader.py",
    "rollout_server/engine/scoring/sequential.py": "tests/engine/scoring/test_reader.py",
    "rollout_server/engine/thread.py": "tests/engine/test_handle.py",
    "rollout_server/errors.py": "tests/http/test_problems.py",
    "rollout_server/fleet/codec/values.py": "tests/fleet/codec/test_frames.py",
    "rollout_server/fleet/ledger/records.py": "tests/fleet/ledger/test_ledger.py",
    "rollout_server/fleet/ranks/follower.py": "tests/fleet/ranks/test_lockstep.py",
    "rollout_server/fleet/ray/cluster.py": "tests/ray/test_refusals.py",
    "rollout_server/fleet/ray/connection.py": "tests/ray/test_placed.py",
    "rollout_server/fleet/ray/placed.py": "tests/ray/test_placed.py",
    "rollout_server/fleet/replica/joiner.py": "tests/fleet/test_failures.py",
    "rollout_server/fleet/wire.py": "tests/fleet/codec/test_frames.py",
    "rollout_server/http/app.py": "tests/http/test_server.py",
    "rollout_server/http/observing/observer.py": "tests/http/observing/test_row_metrics.py",
    "rollout_server/http/observing/vllm_names.py": "tests/http/observing/test_row_metrics.py",
    "rollout_server/http/openapi.py": "tests/docs/test_api_page.py",
    "rollout_server/http/page/frames.py": "tests/http/page/test_differences.py",
    "rollout_server/http/replies/streaming.py": "tests/http/routes/test_rollouts.py",
    "rollout_server/http/requests/json_body.py": "tests/http/bad_input/test_bodies.py",
    "rollout_server/http/residents.py": "tests/end_to_end/residents/test_residents.py",
    "rollout_server/http/service.py": "tests/end_to_end/residents/test_residents.py",
    "rollout_server/machine/selftest.py": "tests/machine/test_doctor.py",
    "rollout_server/models/encoders/heads.py": "tests/engine/model/encoders/test_reading.py",
    "rollout_server/models/recurrent/recurrent_gemma.py": "tests/engine/model/test_recurrent_kinds.py",
    "rollout_server/models/vision/pixtral.py": "tests/engine/model/vision/test_reader.py",
    "rollout_server/models/vision/qwen.py": "tests/models/vision/test_towers.py",
    "rollout_server/models/vision/qwen2_vl.py": "tests/models/vision/test_towers.py",
    "rollout_server/models/vision/vit.py": "tests/engine/model/vision/test_reader.py",
    "rollout_server/schemas/openai/chat.py": "tests/http/routes/openai/test_chat_tools.py",
    "rollout_server/schemas/pooling/pairs.py": "tests/http/routes/pooling/test_pairs.py",
    "rollout_server/schemas/rollouts.py": "tests/http/routes/test_rollouts.py",
    "rollout_server/text/token_texts.py": "tests/text/test_detokenize.py",
    "rollout_server/versions/publisher.py": "tests/versions/test_startup.py",
    "trainer_client/verbs/publishing.py": "tests/end_to_end/residents/test_residents.py",
    "trainer_client/verbs/sampling.py": "tests/trainer_client/verbs/test_verbs.py",
    "trainer_client/verbs/scoring.py": "tests/trainer_client/test_what_trainers_hold.py",
}


@pytest.fixture(scope="module")
def known() -> dict[str, Path]:
    """Our modules and the files of tests, by their full names."""
    return modules(*SOURCES, "tests")


@pytest.fixture(scope="module")
def arrows(known: Mapping[str, Path]) -> Callable[[str], set[str]]:
    """What a module of `known` imports, wherever the statement stands, or names, as one that starts a process does."""
    found: dict[str, set[str]] = {}

    def of(name: str) -> set[str]:
        if name not in found:
            texts = (node.value for node in nodes_of(known[name]) if isinstance(node, ast.Constant))
            named = {text for text in texts if isinstance(text, str) and text in known}
            begun = {f"{text}.__main__" for text in named} & known.keys()
            found[name] = {*imported(name, known[name], known), *named, *begun}
        return found[name]

    return of


def reached(start: Iterable[str], arrows: Callable[[str], set[str]], through: Callable[[str], bool]) -> set[str]:
    """What is imported from `start` on, by way of the modules that `through` lets pass."""
    seen, left = set[str](), list(start)
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left += arrows(name) if through(name) else ()
    return seen


def own_tests(module: str) -> list[str]:
    """Files that are called as the module is: below the name of its package, or without that."""
    folder, _, name = module.rpartition("/")
    return [f"tests/{where}/test_{name}".replace("//", "/") for where in (folder, "/".join(folder.split("/")[1:]))]


def has_own_test(module: str) -> bool:
    return any((ROOT / test).is_file() for test in own_tests(module))


def looked_for() -> list[str]:
    """Modules that need a test that is found."""
    return [
        path.relative_to(ROOT).as_posix()
        for path in modules(*SOURCES).values()
        if path.name != "__init__.py" and len(path.read_text("utf-8").splitlines()) >= LEAST_LINES
    ]


def dotted(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".")


def test_the_test_of_a_module_is_found() -> None:
    lost = [module for module in looked_for() if not has_own_test(module) and module not in ELSEWHERE]
    assert not lost, f"name a test after each, or say in ELSEWHERE which file holds it: {lost}"


def test_the_table_says_nothing_that_is_over() -> None:
    needed = set(looked_for())
    gone = [module for module in ELSEWHERE if module not in needed]
    assert not gone, f"gone, or under {LEAST_LINES} lines: {gone}"
    named = [module for module in ELSEWHERE if has_own_test(module)]
    assert not named, f"they have a test of their own name: {named}"
    missing = [test for test in ELSEWHERE.values() if not (ROOT / test).is_file()]
    assert not missing, f"no such tests: {missing}"


def test_whoever_holds_a_module_can_reach_it(known: Mapping[str, Path], arrows: Callable[[str], set[str]]) -> None:
    """It imports the module, or what imports it, itself or by way of what tests share. Families of models are loaded by
    their names. Whether the test would notice a fault is not seen from here."""
    apart = []
    for module, test in ELSEWHERE.items():
        shared = (dotted(f"{folder.as_posix()}/conftest.py") for folder in Path(test).parents)
        start = [dotted(test), *(name for name in shared if name in known)]
        asked = reached(start, arrows, lambda name: name.startswith("tests."))
        imports, name = reached(asked, arrows, lambda name: True), dotted(module)
        by_name = name.startswith("rollout_server.models.") and LOADER in imports
        if name not in imports and not by_name:
            apart.append(f"{test} cannot reach {module}")
    assert not apart, apart
