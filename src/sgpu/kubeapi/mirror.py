"""A copy of the objects that a selector selects, kept up to date by a watch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final, NoReturn

import trio

from sgpu.kubeapi.client import ApiServer, Event, Object, Query
from sgpu.kubeapi.error import ApiServerError
from sgpu.lib.concurrency import Broadcast
from sgpu.lib.logs import OnChange
from sgpu.lib.retry import growing_delays, jittered

logger = logging.getLogger(__name__)

#: Seconds between attempts, growing from the first to the last, each by chance down to the half.
DELAYS: Final = (1.0, 30.0)


class Mirror:
    """The objects of one kind, by name, and `changed` when one of them differs. A lost server changes nothing.

    Objects of several namespaces must differ in name.
    """

    def __init__(self, api: ApiServer, path: str, query: Query) -> None:
        self.objects: Mapping[str, Object] = {}
        #: Whether the server has been read at all.
        self.synced = False
        self.changed = Broadcast()
        self._api = api
        self._path = path
        self._query = query
        self._version = ""  # the resource version to watch from; empty: list first
        self._problem = OnChange(logger, logging.WARNING)

    async def run(self) -> NoReturn:
        """Keep the copy up to date. Whatever goes wrong is logged and tried again."""
        delays = growing_delays(*DELAYS)
        while True:
            wait = 0.0
            try:
                if not self._version:
                    await self._list()
                await self._watch()
            except ApiServerError as error:
                wait = error.retry_after
                if error.expired:
                    self._version = ""
                else:
                    self._problem.report(f"cannot watch {self._path}, trying again: {error}")
            else:
                self._problem.clear()
                delays = growing_delays(*DELAYS)
            await trio.sleep(max(jittered(next(delays)), wait))

    def put(self, thing: Object) -> None:
        """Take an object as the server returned it, before the watch brings it."""
        self._set({**self.objects, _name(thing): thing})

    def remove(self, name: str) -> None:
        """Take that an object was deleted, before the watch brings it."""
        self._set({key: thing for key, thing in self.objects.items() if key != name})

    async def _list(self) -> None:
        listed = await self._api.get(self._path, self._query)
        self._version = str(listed.get("metadata", {}).get("resourceVersion", ""))
        # Of a kind that a list does not repeat in its items.
        self._set({_name(thing): thing for thing in listed.get("items") or ()})
        if not self.synced:
            self.synced = True
            self.changed.notify()

    async def _watch(self) -> None:
        async with self._api.watch(self._path, self._version, self._query) as events:
            async for event in events:
                self._problem.clear()
                self._apply(event)

    def _apply(self, event: Event) -> None:
        if event.kind == "DELETED":
            known = self.objects.get(_name(event.object))
            if known and _uid(known) == _uid(event.object):  # else it was created anew meanwhile, and `put` here
                self.remove(_name(event.object))
        elif event.kind != "BOOKMARK":
            self.put(event.object)
        self._version = str(event.object.get("metadata", {}).get("resourceVersion", self._version))

    def _set(self, objects: Mapping[str, Object]) -> None:
        if objects != self.objects:
            self.objects = objects
            self.changed.notify()


def _uid(thing: Object) -> str:
    return str(thing.get("metadata", {}).get("uid", ""))


def _name(thing: Object) -> str:
    return str(thing.get("metadata", {}).get("name", ""))
