"""A snapshot as a page for browsers: one HTML document without scripts, which loads nothing. Pure.

Imported when the first one asks. All text that comes from elsewhere goes through `_text`.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable
from typing import Final

from sgpu.lib.logs import printable
from sgpu.lib.sizes import GIB
from sgpu.node.cgroup_limit import LimitState
from sgpu.node.usage import ContainerUse
from sgpu.observe.describe import UNKNOWN, ago, by_memory, cordon, free_shares, front_end, notes, percent, size
from sgpu.observe.snapshot import GpuSnapshot, ResourceSnapshot, Snapshot

#: Seconds until the browser loads the page again, unless its reader has stopped that.
REFRESH: Final = 10
#: The query of the page that stays as it is: for who reads slowly, or has it read aloud.
STILL: Final = "refresh=off"
STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --dim: #5b626a; --line: #c9ced4;
  --good: #11652f; --bad: #a8071a; --note: #7a4b00 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --paper: #16181b; --dim: #a3abb3; --line: #444b52;
  --good: #6fd08c; --bad: #ff8f8f; --note: #f0c060 } }
body { font: 1rem/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 72rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.4rem; margin: 0 0 .25rem } h2 { font-size: 1.1rem; margin: 2rem 0 .25rem }
p { margin: .25rem 0 } a { color: inherit } code, .id { font-family: ui-monospace, monospace; font-size: .9rem }
.id { overflow-wrap: anywhere } .dim { color: var(--dim) } .good { color: var(--good) }
.bad { color: var(--bad); font-weight: 600 } .note { color: var(--note) }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; margin: .5rem 0 }
caption { text-align: left; color: var(--dim) }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line) }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: .5rem 0 }
dt { color: var(--dim) } dd { margin: 0 } meter { width: 12rem; max-width: 40vw; vertical-align: middle }
"""
_DIGEST: Final = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
CONTENT_TYPE: Final = "text/html; charset=utf-8"
HEADERS: Final = {
    "Cache-Control": "no-store",
    # A browser would do nothing that such a text asks for, should one get past `_text`.
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_DIGEST}'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def render(snapshot: Snapshot, *, refresh: bool) -> bytes:
    """Return the document. `refresh`: the browser loads it again by itself."""
    head = f"sgpu {_text(snapshot.version)}"
    toggle = (
        f'Updated every {REFRESH} s. <a href="?{STILL}">Stop updating</a>'
        if refresh
        else 'Not updated. <a href="?">Update again</a>'
    )
    body = "\n".join(
        (
            f"<h1>{head}</h1>",
            f"<p>{_text(_about_node(snapshot))}</p>",
            *map(_resource, snapshot.resources),
            *(f"<p>{_text(chosen)}</p>" for chosen in filter(None, (front_end(snapshot),))),
            *(f'<p class="note">⚠ {_text(note)}</p>' for note in notes(snapshot, snapshot.time)),
            *map(_gpu, snapshot.gpus, (snapshot.time for _ in snapshot.gpus)),
        )
    )
    meta = f'<meta http-equiv="refresh" content="{REFRESH}">' if refresh else ""
    links = " · ".join(f'<a href="{name}">{name}</a>' for name in ("metrics", "status", "healthz", "readyz"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">{meta}
<title>{head}: {_text(_summary(snapshot))}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
<footer><p class="dim">{toggle} · {links}</p></footer>
</body>
</html>
""".encode("utf-8", "replace")


def _text(text: str) -> str:
    return html.escape(printable(text))


def _summary(snapshot: Snapshot) -> str:
    down = sum(not gpu.healthy for gpu in snapshot.gpus)
    return f"{len(snapshot.gpus)} GPU{'s' * (len(snapshot.gpus) != 1)}{f', {down} unhealthy' if down else ''}"


def _about_node(snapshot: Snapshot) -> str:
    if snapshot.simulated:
        return f"{_summary(snapshot)}, simulated, no driver"
    sampled = UNKNOWN if snapshot.sampled_at is None else f"{ago(snapshot.time - snapshot.sampled_at)} ago"
    return f"{_summary(snapshot)}, driver {snapshot.driver_version or 'not there yet'}, last sample {sampled}"


def _resource(resource: ResourceSnapshot) -> str:
    if not resource.registered:
        kind, state = "bad", "not registered with the kubelet"
    elif not resource.streams:
        kind, state = "note", "registered, but the kubelet does not watch its devices"
    else:
        kind, state = "good", "registered with the kubelet"
    return f'<p><code>{_text(resource.name)}</code>: <span class="{kind}">{state}</span></p>'


def _gpu(gpu: GpuSnapshot, now: float) -> str:
    since = ago(now - gpu.since)
    health = f'<span class="good">healthy</span> for {since}'
    if not gpu.healthy:
        health = f'<span class="bad">unhealthy</span> for {since}: {_text(gpu.reason)}'
    facts = {
        "Health": health,
        **({"Cordon": f'<span class="note">{_text(cordon(gpu, now))}</span>'} if gpu.cordon else {}),
        "Offered as": f"<code>{_text(gpu.resource)}</code>" if gpu.resource else "not offered",
        "Memory": _memory(gpu),
        "Utilization": percent(gpu.utilization),
        "Shares": _shares(gpu),
    }
    name = f'{_text(gpu.name)} <span class="dim">{_text(gpu.pci_bus_id)}</span>'
    listed = "".join(f"<dt>{fact}</dt><dd>{value}</dd>" for fact, value in facts.items())
    return f'<h2>{name}</h2>\n<p class="id">{_text(gpu.uuid)}</p>\n<dl>{listed}</dl>\n{_table(gpu)}'


def _memory(gpu: GpuSnapshot) -> str:
    if gpu.memory_total is None or gpu.memory_used is None:
        return f"{UNKNOWN} of {size(gpu.memory_total)}"
    label = f"{size(gpu.memory_used)} of {size(gpu.memory_total)}"
    used, total = (f"{amount / GIB:.3f}" for amount in (gpu.memory_used, gpu.memory_total))
    return f'<meter min="0" max="{total}" value="{used}" aria-label="Memory used">{label}</meter> {label}'


def _shares(gpu: GpuSnapshot) -> str:
    free = free_shares(gpu)
    if free is None:
        return f"{gpu.shares} in all, {gpu.withheld} withheld"
    rest = f"{free} free" if gpu.healthy else f'<span class="bad">{free} down</span>'
    return f"{gpu.allocated} used, {rest}, {gpu.withheld} withheld"


def _table(gpu: GpuSnapshot) -> str:
    if not gpu.containers:
        return '<p class="dim">No container has a share of it or uses it.</p>'
    columns = ("Pod", "Container", "Shares", "Memory", "May use", "Utilization")
    head = "".join(f'<th scope="col"{_number(index > 1)}>{name}</th>' for index, name in enumerate(columns))
    rows = "\n".join(f"<tr>{_cells(_use(use))}</tr>" for use in by_memory(gpu.containers))
    return (
        '<div class="scroll" tabindex="0"><table><caption>Containers that have a share of it, or use it</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def _use(use: ContainerUse) -> tuple[str, ...]:
    pod = f"{use.namespace}/{use.pod}" if use.pod else f"no pod: {use.processes} processes"
    may = size(use.memory_limit if use.exceeded is None else use.exceeded)
    if use.memory_limit is not None and use.limit_state != LimitState.ENFORCED.value:
        may += " (not enforced)"
    shares = str(use.shares) if use.pod else UNKNOWN
    over = " (too much)" if use.exceeded is not None else ""
    return pod, use.container, shares, size(use.memory_used) + over, may, percent(use.utilization)


def _cells(values: Iterable[str]) -> str:
    first, *rest = (_text(value) for value in values)
    cells = (f"<td{_number(index > 0)}>{value}</td>" for index, value in enumerate(rest))
    return f'<th scope="row">{first}</th>{"".join(cells)}'


def _number(is_number: bool) -> str:
    return ' class="number"' if is_number else ""
