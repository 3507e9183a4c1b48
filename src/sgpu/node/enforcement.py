"""The limits that are wanted now, those that sgpu has set, and what the driver answered of each.

Whoever knows the cgroups says what is wanted; whoever talks to the driver takes the table and brings the answers. Knows
neither NVML nor file systems.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sgpu.lib.concurrency import Broadcast
from sgpu.node.cgroup_limit import ContainerLimit, LimitAnswer, LimitState, Target, WantedLimit
from sgpu.node.container import Container
from sgpu.node.limits import WantedLimits

#: A limit that is not there any more, by whatever means.
_OVER = frozenset({LimitState.REMOVED, LimitState.FOREIGN})
_NOT_ENFORCED = (LimitState.REFUSED, LimitState.FOREIGN)


class Enforcement:
    """`changed` notifies of another table, `answered` of answers of the driver."""

    def __init__(self) -> None:
        self.changed = Broadcast()
        self.answered = Broadcast()
        #: Notifies whoever looks at cgroups that there is a reason to look now.
        self.look = Broadcast()
        self.wanted = WantedLimits()
        #: Why the cgroups of pods can't be known; empty if they are.
        self.problem = ""
        self._decided = False  # whether anybody has said what is wanted
        self._ours: dict[Target, None] = {}  # limits that sgpu set, as far as it knows
        self._answers: dict[Target, LimitAnswer] = {}

    def want(self, wanted: WantedLimits) -> None:
        """Take the limits that are wanted from now on."""
        before, self.wanted = self.wanted, wanted
        first, self._decided = not self._decided, True
        if first or wanted.hard != before.hard:
            self.changed.notify()
        if wanted != before:
            self.answered.notify()

    def set_problem(self, problem: str) -> None:
        """Take why cgroups can't be known, empty if they are; what was wanted stays."""
        if problem != self.problem:
            self.problem = problem
            self.answered.notify()

    def adopt(self, targets: Iterable[Target]) -> None:
        """Take limits that an earlier sgpu set: what is not wanted of them is removed."""
        self._ours.update(dict.fromkeys(targets))
        self.changed.notify()

    def forget(self, targets: Iterable[Target]) -> None:
        """Take that these cgroups are gone, and their limits with them."""
        for target in targets:
            self._ours.pop(target, None)
            self._answers.pop(target, None)

    def answer(self, answers: Iterable[LimitAnswer]) -> None:
        """Take what the driver says. An answer to what is no longer wanted changes only whose the limit is."""
        for answer in answers:
            target = answer.wanted.target
            if answer.state is LimitState.ENFORCED:
                self._ours[target] = None
            elif answer.state in _OVER:
                self._ours.pop(target, None)
            self._answers[target] = answer
        self._answers = {target: answer for target, answer in self._answers.items() if target in self.wanted.hard}
        self.answered.notify()

    def table(self) -> Mapping[Target, WantedLimit]:
        """Return all that the driver should do: limits to set, and limits of ours to remove.

        Nothing is removed before anybody has said what is wanted: those of an earlier sgpu mostly still are.
        """
        wanted = self.wanted.hard
        over = [target for target in self._ours if target not in wanted] if self._decided else []
        return {
            **{target: WantedLimit(*target, hard, target in self._ours) for target, hard in wanted.items()},
            **{target: WantedLimit(*target, None, ours=True) for target in over},
        }

    def recorded(self) -> tuple[Target, ...]:
        """Return the limits that sgpu has set or is about to set."""
        targets = dict.fromkeys((*self._ours, *self.wanted.hard))
        for target, answer in self._answers.items():
            if answer.state is LimitState.FOREIGN and target not in self._ours:
                targets.pop(target, None)
        return tuple(targets)

    def state(self, target: Target) -> ContainerLimit | None:
        """Return what is known of a limit that is wanted; None if none is."""
        hard = self.wanted.hard.get(target)
        if hard is None:
            return None
        answer = self._answers.get(target)
        if answer is None or answer.wanted.hard != hard:
            return ContainerLimit(hard, LimitState.PENDING, reason="the driver has not answered yet")
        return ContainerLimit(answer.hard or hard, answer.state, answer.used, answer.reason)

    def by_container(self) -> Mapping[str, Mapping[Container, ContainerLimit]]:
        """Return the limit of each container that is known, by the GPU's UUID."""
        found: dict[str, dict[Container, ContainerLimit]] = {}
        for target, container in self.wanted.containers.items():
            if limit := self.state(target):
                found.setdefault(target.uuid, {})[container] = limit
        return found

    def problems(self) -> Mapping[str, int]:
        """Return why limits are not enforced, and how many each reason holds for; without those that are pending."""
        found: dict[str, int] = {}
        for target, answer in self._answers.items():
            if answer.state in _NOT_ENFORCED and answer.wanted.hard == self.wanted.hard.get(target):
                reason = answer.reason or answer.state.value
                found[reason] = found.get(reason, 0) + 1
        return found
