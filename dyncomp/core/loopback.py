"""Addresses for processes that all run on this host."""

import socket


def free_address() -> str:
    """``HOST:PORT`` on the loopback device that nobody listens to now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"
