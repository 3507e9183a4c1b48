"""ResourceClaims as the scheduler leaves them, for tests."""

from __future__ import annotations

from collections.abc import Sequence

from sgpu.dra.slices import DRIVER, Object, device_name

NODE = "node-a"
NAMESPACE = "team"
RESOURCE = "deepomatic.com/shared-gpu"


def result(uuid: str, share_id: str = "s-1", request: str = "gpu", **changed: object) -> Object:
    """One allocated device: one share, without memory."""
    made = {
        "driver": DRIVER,
        "request": request,
        "pool": NODE,
        "device": device_name(uuid),
        "shareID": share_id,
        "consumedCapacity": {"shares": "1"},
    }
    return {key: value for key, value in {**made, **changed}.items() if value is not None}


def sharing(source: str = "FromClaim", requests: tuple[str, ...] = (), **fields: object) -> Object:
    """One configuration of an allocation."""
    parameters = {"apiVersion": f"{DRIVER}/v1alpha1", "kind": "SharingConfig", **fields}
    return {"source": source, "requests": list(requests), "opaque": {"driver": DRIVER, "parameters": parameters}}


def claim(
    *results: Object, uid: str = "u-1", name: str = "c", config: Sequence[Object] = (), **status: object
) -> Object:
    """A claim with these devices, reserved for the pod `p`."""
    devices = {"results": list(results), "config": list(config)}
    reserved = [{"resource": "pods", "name": "p", "uid": "p-1"}]
    return {
        "metadata": {"namespace": NAMESPACE, "name": name, "uid": uid},
        "status": {"allocation": {"devices": devices}, "reservedFor": reserved, **status},
    }
