"""The trainer process: trains an adapter through the rollout server at `--url`, whose base is loaded from `--model`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import MISSING, fields
from pathlib import Path

from rich.console import Console

from trainer_client import RolloutClient, TrainerClientError

from .evaluation import evaluate
from .loop import Step, compare, publish, sample, train
from .policy import Policy
from .progress import Watch, watching
from .report import draw, summary, write_held_out, write_rollouts, write_steps
from .settings import Settings
from .task import held_out_problems, training_problems


def run(settings: Settings, watch: Watch) -> None:
    """Trains, evaluates, and writes everything of the run into `settings.output`."""
    started = time.perf_counter()
    output = settings.output
    output.mkdir(parents=True, exist_ok=True)
    policy = Policy(settings)
    steps: list[Step] = []

    def report(step: Step) -> None:
        steps.append(step)
        watch.step(step)

    with RolloutClient(settings.url) as client:
        train(settings, client, policy, report)
        version, _ = publish(settings, client, policy, "final")
        problems = training_problems()[:: len(training_problems()) // settings.prompts][: settings.prompts]
        sampled = sample(settings, client, policy, version, problems, seed=settings.seed)
        agreement = compare(policy, sampled)
        watch.say(f"evaluating base and {version.name}@{version.version} on {settings.problems} held-out problems")
        held_out = held_out_problems(settings.problems, settings.seed)
        base = evaluate(client, "base", held_out, settings.max_tokens)
        final = evaluate(client, version, held_out, settings.max_tokens)
    policy.save(output / "adapter")
    write_steps(output / "steps.jsonl", steps)
    write_held_out(output / "held_out.jsonl", base, final)
    write_rollouts(output / "rollouts.safetensors", sampled, version)
    if not draw(output / "reward.png", steps):
        watch.say(
            "reward.png is not drawn because matplotlib is missing: pip install 'rollout-server[demo]' brings it."
        )
    result = summary(steps, base, final, (sampled, agreement), version)
    result |= {"seed": settings.seed, "trainer_seconds": time.perf_counter() - started}
    (output / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse(arguments: list[str]) -> Settings:
    """One option per field of `Settings`; those without a default are required."""
    kinds = {"int": int, "float": float, "str": str, "Path": Path}
    parser = argparse.ArgumentParser(prog="trainer", description=__doc__)
    for field in fields(Settings):
        option = f"--{field.name.replace('_', '-')}"
        if field.type == "bool":
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            required = field.default is MISSING
            parser.add_argument(
                option, type=kinds[str(field.type)], required=required, default=None if required else field.default
            )
    return Settings(**vars(parser.parse_args(arguments)))


def main() -> None:
    settings = parse(sys.argv[1:])
    try:
        with watching(Console(), settings.steps) as watch:
            run(settings, watch)
    except (TrainerClientError, OSError) as error:
        sys.exit(f"trainer: {error}")


if __name__ == "__main__":
    main()
