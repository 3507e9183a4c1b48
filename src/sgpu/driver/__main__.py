"""`python -m sgpu.driver`: the driver's process (`worker`)."""

from sgpu.lib.postpone import postpone


def main() -> None:
    """Run the worker without what attrs imports and it never needs: 1.1 MB."""
    postpone("inspect")
    postpone("attr.validators")
    from sgpu.driver.worker import main as run

    run()


if __name__ == "__main__":
    main()
