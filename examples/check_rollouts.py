"""Are the rollouts what they say, and is the trainer where it thinks it is?

    rollout-server serve            # in another terminal
    python examples/check_rollouts.py

Needs numpy and httpx only. `trainer_logprobs` would come from the trainer's own forward; here the server's stand in.
"""

from trainer_client import RolloutClient

client = RolloutClient("http://127.0.0.1:8000")
batch = client.rollouts(["12+34=", "7+8="], n=4, max_tokens=16, temperature=0.8, top_p=0.95, seed=1)

for index, found in enumerate(client.replay(batch)):
    said = "exact" if found.exact else f"differs at token {found.first_difference}, margin {found.margin}"
    print(f"row {index}: {said}")

trainer_logprobs = client.logprobs(batch, policy="base", temperature=0.8).logprobs
for found in client.probe(batch, trainer_logprobs, temperature=0.8):
    print(f"{found.version.name}@{found.version.version}: {found.tokens} tokens, kl {found.rescored.kl:.1e}")
