from __future__ import annotations

import hashlib

import numpy as np
import pytest

from adapters.bundle import Content
from adapters.errors import GoneVersion, LiveVersion, Mismatch, RegistryError, UnknownName, UnknownVersion
from adapters.versions.registry import Change, Facts, Registry
from adapters.versions.retention import GONE_DIGESTS

FACTS = Facts(kind="lora", mode="adapter", rank=8, modules=14, nbytes=1000)


def sha(content: object) -> str:
    return f"sha256:{hashlib.sha256(str(content).encode()).hexdigest()}"


def as_content(of: object) -> Content:
    return Content(sha(of), "adapter")


def push(registry: Registry, content: object, name: str = "p", **options: object) -> Change:
    return registry.publish(name, sha(content), FACTS, created=0.0, **options)  # type: ignore[arg-type]


def numbers(registry: Registry, name: str = "p") -> list[int]:
    return [entry.number for entry in registry.versions(name)]


def test_versions_are_numbered_per_name_and_the_alias_follows() -> None:
    registry = Registry(4)
    assert push(registry, "a").entry.number == 1
    change = push(registry, "b", label="step-2")
    assert (change.entry.number, change.entry.live, change.entry.label) == (2, True, "step-2")
    assert push(registry, "a", name="q").entry.number == 1
    assert registry.names == ("p", "q")
    assert [entry.live for entry in registry.versions("p")] == [False, True]
    assert registry.resolve("p").number == 2 and registry.resolve("p", 1).digest == sha("a")


def test_without_activation_nothing_moves() -> None:
    registry = Registry(4)
    push(registry, "a", activate=False)
    assert registry.live("p") is None
    with pytest.raises(UnknownVersion, match="No version of p is live: activate one, or ask for p@1"):
        registry.resolve("p")
    push(registry, "b")
    push(registry, "c", activate=False)
    assert registry.resolve("p").number == 2
    assert registry.activate("p", 3).entry.live
    assert registry.resolve("p").number == 3
    assert registry.activate("p", 1).entry.number == 1  # Rolled back.
    assert registry.activate("p", 1).unchanged


def test_the_same_content_again_is_unchanged() -> None:
    registry = Registry(4)
    push(registry, "a", label="one")
    again = push(registry, "a", if_match="99")  # A retry whose If-Match is out of date is still safe.
    assert again.unchanged and (again.entry.number, again.entry.label) == (1, "one")
    assert push(registry, "a", label="two").entry.label == "two"
    assert registry.same("p", sha("a"), "adapter") == registry.resolve("p")
    assert registry.same("p", sha("a"), "merged") is None
    assert registry.same("p", sha("b"), "adapter") is None and registry.same("x", sha("a"), "adapter") is None


def test_pushing_the_newest_again_activates_it() -> None:
    registry = Registry(4)
    push(registry, "a")
    push(registry, "b", activate=False)
    quiet = push(registry, "b", activate=False)
    assert quiet.unchanged and not quiet.entry.live and registry.resolve("p").number == 1
    change = push(registry, "b")
    assert change.unchanged and change.entry.live and registry.resolve("p").number == 2


def test_pushing_the_live_one_again_leaves_the_alias() -> None:
    registry = Registry(4)
    push(registry, "a")
    push(registry, "b", activate=False)
    assert push(registry, "a").unchanged and registry.resolve("p").number == 1


def test_an_older_content_again_is_a_new_version() -> None:
    registry = Registry(4)
    push(registry, "a")
    push(registry, "b")
    change = push(registry, "a")
    assert not change.unchanged and change.entry.number == 3
    assert registry.resolve("p", digest=sha("a")[:20]).number == 3, "the newest of equal content is meant"


def test_if_match() -> None:
    registry = Registry(4)
    with pytest.raises(Mismatch, match="no version of p is live"):
        push(registry, "a", if_match="1")
    assert registry.names == ()
    push(registry, "a")
    for stale in ("2", sha("b"), sha("b")[:15], "newest", ""):
        with pytest.raises(Mismatch):
            push(registry, "b", if_match=stale)
        with pytest.raises(Mismatch):
            registry.activate("p", 1, if_match=stale)
    assert numbers(registry) == [1]
    push(registry, "b", if_match="1")
    push(registry, "c", if_match=sha("b"))
    assert registry.activate("p", 1, if_match=sha("c")[:20]).entry.live


def test_retention_keeps_the_newest_the_live_the_pinned_and_the_used() -> None:
    registry = Registry(2)
    push(registry, 1)
    push(registry, 2, activate=False)
    push(registry, 3, activate=False)
    registry.acquire("p", 2)
    registry.pin("p", 3, True)
    assert push(registry, 4, activate=False).freed == ()
    assert push(registry, 5, activate=False).freed == ()
    assert numbers(registry) == [1, 2, 3, 4, 5]
    assert registry.activate("p", 5).freed == (as_content(1),)
    assert registry.release("p", 2) == (as_content(2),)
    assert registry.pin("p", 3, False).freed == (as_content(3),)
    assert numbers(registry) == [4, 5]


def test_a_used_version_is_freed_with_its_last_row() -> None:
    registry = Registry(1)
    push(registry, "a")
    registry.acquire("p", 1, rows=3)
    assert push(registry, "b").freed == ()
    assert registry.resolve("p", 1).in_use == 3
    registry.acquire("p", 1)
    assert registry.release("p", 1, rows=3) == ()
    assert registry.release("p", 1) == (as_content("a"),)
    for rows in (1, 0):
        with pytest.raises(ValueError, match="release p@1"):
            registry.release("p", 1, rows)
    with pytest.raises(ValueError, match="fewer rows hold"):
        registry.release("p", 2)


def test_a_provisional_version_pushes_out_no_other() -> None:
    """It may be taken back, because the disk failed: then all is as it was."""
    registry = Registry(2)
    push(registry, "a")
    registry.acquire("p", 1)
    push(registry, "b")
    push(registry, "c", provisional=True)
    assert registry.release("p", 1) == () and numbers(registry) == [1, 2, 3]
    registry.delete("p", 3)
    assert numbers(registry) == [1, 2] and (live := registry.live("p")) and live.number == 2
    push(registry, "d", provisional=True)
    assert push(registry, "d").freed == (as_content("a"),) and numbers(registry) == [2, 4]
    assert push(registry, "e", provisional=True).freed == ()
    assert push(registry, "e", activate=False).freed == (as_content("b"),) and numbers(registry) == [4, 5]


def test_freed_is_not_unknown() -> None:
    registry = Registry(1)
    for content in ("a", "b"):
        push(registry, content)
    for address in ({"number": 1}, {"digest": sha("a")}, {"digest": sha("a")[:15]}):
        with pytest.raises(GoneVersion, match="was freed"):
            registry.resolve("p", **address)  # type: ignore[arg-type]
    for number in (0, 3, -1):
        with pytest.raises(UnknownVersion, match="its newest is 2"):
            registry.resolve("p", number)
    with pytest.raises(UnknownVersion, match="no version with digest"):
        registry.resolve("p", digest=sha("c"))
    for verb in (registry.acquire, registry.activate):
        with pytest.raises(GoneVersion):
            verb("p", 1)
        with pytest.raises(UnknownName, match="'nobody'"):
            verb("nobody", 1)
    push(registry, "a")  # Its content is there again.
    assert registry.resolve("p", digest=sha("a")).number == 3


def test_memory_of_freed_digests_is_bounded() -> None:
    registry = Registry(1)
    for content in range(GONE_DIGESTS + 3):
        push(registry, content)
    with pytest.raises(UnknownVersion):
        registry.resolve("p", digest=sha(0))
    with pytest.raises(GoneVersion):
        registry.resolve("p", digest=sha(2))
    with pytest.raises(GoneVersion):
        registry.resolve("p", 1)


def test_a_deleted_version_is_gone_at_once_and_freed_with_its_last_row() -> None:
    registry = Registry(4)
    for content in ("a", "b", "c"):
        push(registry, content)
    registry.pin("p", 1, True)
    assert registry.delete("p", 1).freed == (as_content("a"),), "a pin is against age, not against deletion"
    registry.acquire("p", 2, rows=2)
    gone = registry.delete("p", 2)
    assert gone.freed == () and gone.entries[0].in_use == 2
    for address in ({"number": 2}, {"digest": sha("b")}):
        with pytest.raises(GoneVersion):
            registry.resolve("p", **address)  # type: ignore[arg-type]
    assert registry.nbytes == 2 * FACTS.nbytes, "what rows use still has its memory"
    assert not push(registry, "b", activate=False).unchanged, "the same content again is a version of its own"
    registry.acquire("p", 2)
    assert registry.release("p", 2, rows=2) == ()
    assert registry.release("p", 2) == (as_content("b"),)
    with pytest.raises(GoneVersion):
        registry.acquire("p", 2)
    with pytest.raises(LiveVersion, match="p@3 is live"):
        registry.delete("p", 3)
    with pytest.raises(GoneVersion):
        registry.delete("p", 2)
    assert numbers(registry) == [3, 4]


def test_a_deleted_name_is_unknown_and_its_numbers_go_on() -> None:
    registry = Registry(4)
    for content in ("a", "b"):
        push(registry, content)
    registry.acquire("p", 2)
    assert registry.delete_name("p").freed == (as_content("a"),)
    assert registry.names == () and registry.last("p") == 2
    for verb in (registry.resolve, registry.versions, registry.live, registry.delete_name):
        with pytest.raises(UnknownName, match="deleted"):
            verb("p")
    with pytest.raises(GoneVersion):
        registry.resolve("p", 2)
    assert push(registry, "b").entry.number == 3
    assert registry.release("p", 2) == (as_content("b"),)
    assert numbers(registry) == [3]


def test_a_restored_name_goes_on_where_it_was() -> None:
    first = Registry(3)
    for content in ("a", "b", "c"):
        push(first, content, label=content)
    first.pin("p", 1, True)
    first.activate("p", 2)
    second = Registry(1)
    assert second.restore("p", 7, first.versions("p")) == ()
    assert second.versions("p") == first.versions("p")
    assert second.resolve("p").number == 2
    with pytest.raises(GoneVersion):
        second.resolve("p", 7)
    assert second.activate("p", 3).freed == (as_content("b"),)
    assert push(second, "d").entry.number == 8
    with pytest.raises(ValueError, match="known already"):
        second.restore("p", 7, ())
    assert Registry(1).restore("p", 3, first.versions("p")) == (), "pinned, live and newest"
    second.restore("q", 5, ())
    assert "q" not in second.names and push(second, "a", "q").entry.number == 6


def test_keeping_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Registry(0)


def let_go(registry: Registry, verb: str, name: str, number: int) -> tuple[Content, ...]:
    """Pins, unpins, deletes one or all; returns what was freed."""
    if verb == "forget":
        return registry.delete_name(name).freed
    if verb != "delete":
        return registry.pin(name, number, verb == "pin").freed
    freed = registry.delete(name, number).freed
    with pytest.raises(RegistryError):
        registry.resolve(name, number)
    return freed


@pytest.mark.parametrize("seed", range(8))
def test_random_sequences(seed: int) -> None:
    """Against a model that only counts: slots staged and freed balance, nothing needed is freed, numbers only grow."""
    random = np.random.default_rng(seed)
    keep = int(random.integers(1, 4))
    registry = Registry(keep)
    staged: dict[str, int] = {}  # digest → references, as AdapterSlots counts them
    rows: dict[tuple[str, int], int] = {}
    last: dict[str, int] = {}

    def settle(freed: tuple[Content, ...]) -> None:
        for digest, _ in freed:
            staged[digest] -= 1
            assert staged[digest] >= 0

    for _ in range(800):
        name = str(random.choice(["p", "q"]))
        number = int(random.integers(0, last.get(name, 0) + 2))
        verb = random.choice(
            ["push"] * 4
            + ["activate", "acquire", "release", "pin", "unpin", "delete", "delete"]
            + ["forget"] * (random.random() < 0.1)
        )
        try:
            if verb == "push":
                change = push(registry, int(random.integers(6)), name, activate=bool(random.random() < 0.7))
                if not change.unchanged:
                    assert change.entry.number == last.get(name, 0) + 1
                    last[name] = change.entry.number
                    staged[change.entry.digest] = staged.get(change.entry.digest, 0) + 1
                settle(change.freed)
            elif verb == "activate":
                settle(registry.activate(name, number).freed)
                assert registry.resolve(name).number == number
            elif verb == "acquire":
                registry.acquire(name, number)
                rows[name, number] = rows.get((name, number), 0) + 1
            elif verb == "release":
                if not rows:
                    continue
                held = sorted(rows)[int(random.integers(len(rows)))]
                settle(registry.release(*held))
                rows[held] -= 1
                if not rows[held]:
                    del rows[held]
            else:
                settle(let_go(registry, str(verb), name, number))
        except RegistryError as error:
            assert error.message
        check(registry, keep, staged, rows, last)


def check(
    registry: Registry, keep: int, staged: dict[str, int], rows: dict[tuple[str, int], int], last: dict[str, int]
) -> None:
    entries = [entry for name in registry.names for entry in registry.versions(name)]
    counts: dict[str, int] = {}
    in_use = dict(rows)
    for entry in entries:
        counts[entry.digest] = counts.get(entry.digest, 0) + 1
        in_use.pop((entry.name, entry.number), None)
        assert entry.in_use == rows.get((entry.name, entry.number), 0)
        assert entry.number in numbers(registry, entry.name)[-keep:] or entry.live or entry.pinned or entry.in_use, (
            f"{entry} is kept for nothing"
        )
    # What is in use and not listed was deleted, and still has its slot.
    assert sum(counts.values()) + len(in_use) == sum(staged.values()), "a slot leaked, or was freed under a row"
    assert registry.nbytes == FACTS.nbytes * sum(staged.values())
    assert all(staged[digest] >= count for digest, count in counts.items())
    for name in registry.names:
        assert numbers(registry, name)[-1] <= last[name] == registry.last(name)


def test_somebody_else_may_number_and_keep() -> None:
    """A replica is told the number of each version, in whatever order, and frees what it is told to free."""
    registry = Registry(None)
    assert push(registry, "c", number=7, provisional=True).entry.number == 7
    assert push(registry, "a", number=2, provisional=True, activate=False).entry.number == 2
    assert numbers(registry) == [2, 7] and registry.live("p") is None and registry.last("p") == 7
    again = push(registry, "c", number=7, label="late")
    assert again.unchanged and again.entry.live and again.entry.label == "late"
    # Equal to what is live, and yet a version of its own: whoever counts has said so.
    assert push(registry, "c", number=8).entry.number == 8
    for content in range(20):
        push(registry, content)
    assert len(registry.versions("p")) == 23 and registry.last("p") == 28
    registry.delete("p", 2)
    with pytest.raises(GoneVersion):
        registry.resolve("p", 2)
    with pytest.raises(ValueError, match="p@8 is"):
        push(registry, "other", number=8)
