"""Settings → the configuration of the driver's process."""

from __future__ import annotations

from sgpu.config.settings import Settings
from sgpu.driver.messages import WorkerConfig


def worker_config(settings: Settings) -> WorkerConfig:
    """Return where the driver's process is to look, and how often."""
    return WorkerConfig(
        host_path=settings.host_path,
        dev_directory=settings.dev_directory,
        sysfs_directory=settings.sysfs_directory,
        interval=settings.sample_interval,
        proc_directory=settings.proc_directory,
    )
