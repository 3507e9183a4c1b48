"""With `-events` or `-node-labels api`: whether the API server lets the service account do what these need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs
import trio

from sgpu.commands.doctor.finding import Finding, fail, ok
from sgpu.config.settings import Settings

#: Seconds for all that the API server is asked about one setting.
TIMEOUT: Final = 5.0
#: Everybody may ask it about himself, by default. Nothing is stored.
PATH: Final = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


@attrs.frozen
class Needs:
    """What a setting needs: verbs on a resource, which the manifest gives."""

    setting: str
    manifest: str
    resource: str
    verbs: tuple[str, ...]


EVENTS: Final = Needs("-events", "k8s/components/events", "events", ("create",))
NODE_LABELS: Final = Needs("-node-labels api", "k8s/components/node-labels-api", "nodes", ("get", "patch"))


def needed(settings: Settings) -> list[Needs]:
    """Return what these settings need."""
    return [*([EVENTS] if settings.events else []), *([NODE_LABELS] if settings.node_labels == "api" else [])]


async def check_rights(needs: Needs, proxy: str, environment: Mapping[str, str]) -> Finding:
    """Check that the API server answers, and lets the service account do all of it."""
    from sgpu.kubeapi import ApiServerError, find_access, open_api_server  # here, because they bring HTTP and TLS

    lacking = []
    try:
        with trio.fail_after(TIMEOUT):
            async with open_api_server(find_access(proxy, environment, needs.setting, needs.manifest)) as api:
                for verb in needs.verbs:
                    asked = {"verb": verb, "resource": needs.resource}
                    review = {
                        "apiVersion": "authorization.k8s.io/v1",
                        "kind": "SelfSubjectAccessReview",
                        "spec": {"resourceAttributes": asked},
                    }
                    answer = await api.create(PATH, review)
                    if not answer.get("status", {}).get("allowed"):
                        lacking.append(verb)
    except ApiServerError as error:
        return fail(needs.setting, str(error), f"apply {needs.manifest}, with k8s/components/service-account or DRA")
    except trio.TooSlowError:
        return fail(needs.setting, f"no answer within {TIMEOUT:g} s", "see the API server's log, and the network")
    if lacking:
        message = f"the service account may not {' and '.join(lacking)} {needs.resource}"
        return fail(needs.setting, message, f"apply all of {needs.manifest}")
    return ok(needs.setting, f"the service account may {' and '.join(needs.verbs)} {needs.resource}")
