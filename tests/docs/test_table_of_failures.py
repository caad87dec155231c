"""Every row of the guide's table of failures names a scene here that plays it, and every scene is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCENES: dict[str, tuple[str, ...]] = {
    "a replica exits, is killed, runs out of memory, hangs": (
        "test_rows_of_a_killed_a_stopped_and_a_drained_replica_come_back_token_for_token",
        "test_rows_of_a_stopped_replica_come_from_another_and_it_says_nothing_stale_when_it_wakes",
        "test_an_engine_that_hangs_is_ended_by_ray_and_its_rows_come_from_another",
    ),
    "a link is cut, a machine drops off": (
        "test_rows_beyond_a_cut_link_come_back_from_elsewhere_and_the_replica_with_its_versions",
        "test_a_machine_that_drops_off_loses_nobody_a_row",
    ),
    "three replicas end in turn under one row": ("test_work_that_ends_replicas_is_given_up",),
    "a version does not fit on one replica": ("test_what_a_replica_has_no_room_for_is_refused_everywhere",),
    "a version of 4 GiB or more": ("test_a_version_that_fits_in_no_frame_is_refused_and_leaves_nothing",),
    "a replica is slow to stage or to move an alias": (
        "test_whoever_is_slow_to_stage_is_fenced_and_the_push_goes_on",
        "test_whoever_does_not_answer_a_flip_is_fenced_before_the_push_is_told",
    ),
    "no replica stages a version, or moves an alias": (
        "test_a_push_that_no_replica_can_make_is_refused_and_later_ones_are_not_held_up",
        "test_what_no_replica_does_is_given_up_and_they_are_started_anew",
    ),
    "fewer than `--min-replicas` are left before an alias has moved": (
        "test_where_too_few_have_staged_it_the_alias_does_not_move",
        "test_with_fewer_replicas_than_there_have_to_be_versions_do_not_change",
    ),
    "the same, after it has moved": (
        "test_where_too_few_have_flipped_the_push_is_refused_and_its_retry_finds_it_done",
    ),
    "the disk is full": ("test_on_a_full_disk_nothing_is_flipped_anywhere",),
    "a replica that joins is of another base, dtype, context or version": (
        "test_a_replica_that_is_unlike_the_others_is_refused_with_a_sentence",
        "test_a_model_that_is_unlike_the_first_is_refused",
        "test_libraries_of_other_versions_are_refused",
    ),
    "a rank ends, is silent, or does something else than rank 0": (
        "test_rows_of_ranks_of_which_one_is_killed_or_stopped_come_back",
        "test_a_rank_that_did_something_else_ends_the_engine",
        "test_a_rank_that_mlx_launch_started_and_that_ends_ends_the_server",
    ),
    "all replicas are gone": ("test_work_that_no_replica_is_left_for_is_a_503_once_its_time_is_over",),
    "the head of a Ray cluster is lost": (
        "test_a_server_whose_cluster_has_lost_its_head_says_so_and_loses_no_version",
    ),
    "the server is killed": (
        "test_replicas_join_are_filled_and_outlive_their_controller",
        "test_a_controller_that_was_killed_between_record_and_flip_serves_what_it_recorded",
        "test_a_fleet_s_controller_killed_where_a_record_was_written_serves_what_it_acknowledged",
    ),
    "a second server is started on one state directory": (
        "test_replicas_join_are_filled_and_outlive_their_controller",
    ),
}


def test_every_row_of_the_table_has_a_scene() -> None:
    page = (ROOT / "docs" / "guide" / "fleets.md").read_text(encoding="utf-8")
    table = page.partition("## When something fails")[2]
    rows = re.findall(r"^\| (.+?) \| .+ \|$", table, re.MULTILINE)
    assert rows[0] == "what happens" and set(rows[1:]) == SCENES.keys()


@pytest.mark.parametrize("name", sorted({name for scenes in SCENES.values() for name in scenes}))
def test_every_scene_is_a_test(name: str) -> None:
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if f"def {name}(" in path.read_text("utf-8")]
    assert len(files) == 1
