"""`python -m sgpu`."""

import os
import signal
import sys

#: What the loader says of a module's library for want of memory.
NO_ROOM = "failed to map segment from shared object"


def main() -> None:
    """Run the console script."""
    # Until the daemon listens for signals itself, being told to stop ends the process as cleanly: there is nothing
    # to undo yet. (As process 1 of a container, a signal without a handler would be ignored.) At once, because an
    # exception can get lost in whatever is being imported or begun; the other commands do have something to undo.
    command = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0) if command else os._exit(0))

    def start(alive: int | None) -> int:
        # In the child, because the parent should stay small, and after all that: importing takes a good part of the
        # start, and of memory.
        from sgpu.lib.limits import MEMORY
        from sgpu.lib.postpone import postpone_unneeded

        try:
            postpone_unneeded()
            from sgpu.cli import main as run

            return run(sys.argv[1:], os.environ, alive)
        except (MemoryError, ImportError) as error:
            if isinstance(error, ImportError) and not str(error).endswith(NO_ROOM):
                raise
            sys.exit(f"sgpu: {MEMORY}")

    if command:
        sys.exit(start(None))
    from sgpu.parent import run_in_child  # here, because it needs Linux, and `cluster` does not

    sys.exit(run_in_child(start))


def kubectl_sgpu() -> None:
    """Run the console script `kubectl-sgpu`, which kubectl finds as its command `sgpu`."""
    sys.argv.insert(1, "cluster")
    main()


if __name__ == "__main__":
    main()
