"""A connection to Ray: to a cluster, or to one that this process starts for itself on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from graphbuild.errors import ConfigError


def connect(address: str | None, workers: int | None) -> tuple[Any, bool]:
    """The module ray, connected to the cluster at `address` or to one of its own with so many CPUs (None: all); and
    whether that is new: this process may have a Ray already. ConfigError where there is none to be had."""
    with _ray_environment(starts=not address):
        import ray

        if ray.is_initialized():
            return ray, False
        _init(ray, address, workers)
    return ray, True


def _init(ray: Any, address: str | None, workers: int | None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        check_address(address)
        options["address"] = address
    else:  # tasks exchange file names: Ray's object store may be small
        options.update(
            address="local",
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            num_cpus=workers,
        )
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises the bare class where a busy machine takes over half a minute to start it
        if address:
            cause = f"cannot reach Ray at {address} ({error})"
            fix = "check --address and the cluster's token (`ray status`)"
        else:
            cause = f"cannot start Ray on this machine ({error})"
            fix = f"see that {tempfile.gettempdir()} has room and can be written to, or set TMPDIR to a short path;"
            fix += " on a busy machine run the command again"
        raise ConfigError(cause, f"{fix}, or use --workers 0 to run in this process") from error


@contextlib.contextmanager
def _ray_environment(*, starts: bool) -> Iterator[None]:
    """What Ray, its workers too, read from the environment when it is imported and started, for this while alone.

    starts: a cluster of its own, which asks for a token. Ray sets that itself where it was imported before.
    """
    wanted = {"RAY_AUTH_MODE": "token", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    before = {name: os.environ.get(name) for name in wanted}
    if starts and "ray" not in sys.modules:
        os.environ.update({name: value for name, value in wanted.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def check_address(address: str) -> None:
    """Raise ConfigError within seconds when nothing listens at HOST:PORT or ray://HOST:PORT; Ray waits for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # `auto` and other forms are Ray's to resolve
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ConfigError(
            f"--address {address}: nothing answers there ({error})",
            "check it with `ray status` on the cluster's head node",
        ) from None
