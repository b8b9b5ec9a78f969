"""What `stretto jobs create` asks for: the controller's own words for a job, from a file and from options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stretto_proto.v1 import types_pb2

# Of each word, what a JSON file may say. The numbers' ranges are the controller's to judge.
_COUNTS = ("min_nodes", "max_nodes", "base_batch_size", "batch_size", "global_batch_size", "desired_nodes")
_MODES = {
    "in-process": types_pb2.RECONFIGURE_MODE_IN_PROCESS,
    "restart": types_pb2.RECONFIGURE_MODE_RESTART,
}
_WORDS = (*_COUNTS, "mode", "target_tau")


def job_spec(path: Path | None, options: Mapping[str, Any]) -> tuple[types_pb2.JobSpec, int]:
    """(spec, wanted nodes; 0 where nothing says how many). options: None where not given; else they overrule the file.

    Raises ValueError for a file that cannot be read, for words that no job has, and without min_nodes.
    """
    said = {**(_read(path) if path is not None else {}), **{k: v for k, v in options.items() if v is not None}}
    if "min_nodes" not in said:
        raise ValueError("how few nodes may the job train with? Give --min-nodes, or min_nodes in --spec")
    said.setdefault("max_nodes", said["min_nodes"])
    desired = said.pop("desired_nodes", 0)
    mode = _MODES[said.pop("mode", "in-process")]
    try:
        return types_pb2.JobSpec(mode=mode, **said), desired
    except ValueError as error:  # beyond the wire's integers
        raise ValueError(f"the job's spec is {said}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--spec {path} cannot be read as JSON: {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"--spec {path} is no JSON object; give one of {', '.join(_WORDS)}")
    unknown = sorted(said.keys() - set(_WORDS))
    if unknown:
        raise ValueError(f"--spec {path} has {', '.join(unknown)}; allowed: {', '.join(_WORDS)}")
    for word, value in said.items():
        allowed = tuple(_MODES) if word == "mode" else "a number" if word == "target_tau" else "a whole number"
        right = value in _MODES if word == "mode" else type(value) in ((int,) if word in _COUNTS else (int, float))
        if not right:
            raise ValueError(f"--spec {path}: {word} is {value!r}; allowed: {allowed}")
    return said
