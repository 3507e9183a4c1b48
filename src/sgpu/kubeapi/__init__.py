"""The API server, on trio: get, list, watch, create, replace, patch, delete. Knows no kind of object, and no GPU.

Imported only where the API server is used: httpcore takes 1 MB, and TLS 5.
"""

from sgpu.kubeapi.access import Access, find_access
from sgpu.kubeapi.client import ApiServer, Event, Object, open_api_server
from sgpu.kubeapi.error import ApiServerError
from sgpu.kubeapi.mirror import Mirror

__all__ = [
    "Access",
    "ApiServer",
    "ApiServerError",
    "Event",
    "Mirror",
    "Object",
    "find_access",
    "open_api_server",
]
