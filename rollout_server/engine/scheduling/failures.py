"""What a failure in a turn takes along: whatever was being computed, by name. One in the middle of staging a version
takes all rows along: what it left in the stacks may be what they read next."""

from __future__ import annotations

import logging
from collections.abc import Callable

from rollout_server.engine.batch.batches import Batches
from rollout_server.engine.batch.prefix_reuse import PrefixReuse
from rollout_server.engine.blame import Blame
from rollout_server.engine.messages.versions import PolicyCommand
from rollout_server.engine.policies.table import PolicyTable
from rollout_server.engine.requests.reports import Reports
from rollout_server.engine.scheduling.admission import AdmissionControl
from rollout_server.engine.scoring.queue import ScoringQueue
from rollout_server.errors import EngineFault, EngineUnavailable, RolloutError
from rollout_server.text.pictures.picture import Picture

log = logging.getLogger(__name__)

STEP_FAILED = "The step that computed this row failed"


class Failures:
    """`blame` says what was being computed, `device_fault` what is wrong with the device, if anything."""

    def __init__(
        self,
        policies: PolicyTable,
        reports: Reports,
        batches: Batches,
        admission: AdmissionControl,
        scoring: ScoringQueue,
        prefix_reuse: PrefixReuse,
        blame: Blame,
        device_fault: Callable[[], str | None],
    ) -> None:
        self._policies = policies
        self._reports = reports
        self._batches = batches
        self._admission = admission
        self._scoring = scoring
        self._prefix_reuse = prefix_reuse
        self.blame = blame
        self._device_fault = device_fault

    def fail(self, error: Exception) -> None:
        """Fails by name whatever was being computed. Raises `EngineUnavailable` where the device is gone, since
        everything that came after would fail too."""
        if (gone := self._device_fault()) is not None:
            raise EngineUnavailable(
                f"The device no longer computes ({gone}). Nothing that runs on it can be saved: start the server "
                "again; with --state-dir it serves the versions that it had."
            ) from error
        self._policies.routed.forget_inputs()
        if self.blame.of(Picture):
            log.error("The tower failed; what it was to read for fails by name.", exc_info=error)
            self._fail_shown(EngineFault(f"The tower could not read a picture: {type(error).__name__}: {error}"))
        else:
            log.error("A step failed; its rows fail by name and the batch is rebuilt.", exc_info=error)
            doing = "Staging a version failed while this row ran" if self._staging else STEP_FAILED
            self._fail_computed(EngineFault(f"{doing}: {type(error).__name__}: {error}"))
            self._prefix_reuse.clear()  # A prompt that was being kept may never be there.
        self.blame.clear()

    @property
    def _staging(self) -> bool:
        return any(isinstance(blamed, PolicyCommand) for blamed in self.blame)

    def _fail_shown(self, fault: RolloutError) -> None:
        """Whoever is being read and has such a picture. The tower runs before anything else of a forward does, so that
        nothing was computed of the others."""
        if self.blame.of(ScoringQueue):
            self._scoring.fail(fault)
        else:
            self._admission.fail(fault)

    def _fail_computed(self, fault: RolloutError) -> None:
        """The batch that was being computed starts over empty; batches of other sets go on."""
        if self.blame.of(ScoringQueue):
            self._scoring.fail(fault)
            return
        for blamed in self.blame:
            if isinstance(blamed, PolicyCommand):
                self._policies.abandon()
                self._reports.fail(blamed.id, fault)
        self._reports.fail_rows(*self._batches.fail(), fault)
        self._admission.fail(fault)
