"""A process in a container has the memory of the container, and not that of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rollout_server.machine.host_memory import group_limit, host_memory, physical_memory


def limits(root: Path, name: str, given: dict[str, str]) -> None:
    for group, limit in given.items():
        (root / group).mkdir(parents=True, exist_ok=True)
        (root / group / name).write_text(f"{limit}\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("own", "folder", "name"),
    [
        ("0::/outer/inner\n", "", "memory.max"),
        ("5:devices:/\n4:cpu,memory:/outer/inner\n1:name=systemd:/\n", "memory", "memory.limit_in_bytes"),
    ],
    ids=["version 2", "version 1"],
)
def test_the_narrowest_group_counts(own: str, folder: str, name: str, tmp_path: Path) -> None:
    file, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    file.write_text(own, encoding="utf-8")
    assert group_limit(file, mounted) is None, "nothing is mounted"
    limits(mounted / folder, name, {"outer": "3000", "outer/inner": "5000", "outer/inner/below": "7", "other": "8"})
    assert group_limit(file, mounted) == 3000
    limits(mounted / folder, name, {"outer/inner": "2000"})
    assert group_limit(file, mounted) == 2000
    limits(mounted / folder, name, {"outer/inner": "max", "outer": "max"})
    assert group_limit(file, mounted) is None
    limits(mounted / folder, name, {"": "900"})
    assert group_limit(file, mounted) == 900


def test_a_group_that_is_mounted_as_the_root_is_found(tmp_path: Path) -> None:
    """A container may be told the host's name of its group, and sees the group itself as the root."""
    file, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    file.write_text("0::/docker/0123\n", encoding="utf-8")
    limits(mounted, "memory.max", {"": str(8 << 30)})
    assert group_limit(file, mounted) == 8 << 30


def test_other_systems_have_no_groups(tmp_path: Path) -> None:
    assert group_limit(tmp_path / "none", tmp_path) is None


def test_this_process_may_have_something_and_no_more_than_there_is() -> None:
    assert 2**28 < host_memory() <= physical_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
