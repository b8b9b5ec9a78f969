"""What an image's name says will happen, since nothing is pulled. Pure."""

from __future__ import annotations

# registry.example/missing/anything: there is no such image.
_MISSING = "missing"


def pull_failure(image: str) -> str | None:
    """Why the image cannot be pulled; None if it can. A part of its path that is `missing` says that it cannot."""
    parts = image.partition("@")[0].split("/")
    if _MISSING in [part.partition(":")[0] for part in parts]:
        return f'failed to pull and unpack image "{image}": not found'
    return None
