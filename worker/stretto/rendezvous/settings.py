"""What an agent is told by its command line, checked: `--rdzv-*`, `--nnodes`, `--local-addr`."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stretto.channel import parse_endpoints

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousParameters

_log = logging.getLogger(__name__)

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_JOIN_TIMEOUT_S = 600.0
_SIGN_IN_WARNING_S = 60.0
_SIGN_IN_LIMIT_S = 3600.0
_MODES = ("restart", "in-process")
_OUR_KEYS = ("reconfigure", "join_timeout", "slots", "sign_in_warning", "sign_in_limit")
# `timeout` is put there by torch's launcher itself.
_KNOWN_KEYS = frozenset({*_OUR_KEYS, "timeout"})


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """Everything that an agent must know before it speaks to the controller."""

    endpoints: tuple[str, ...]
    # As the user gave it (--rdzv-id).
    run_id: str
    min_nodes: int
    max_nodes: int
    # Where peers reach this node; None: the address on the way to the controller.
    address: str | None = None
    # Without a connection to a controller for so long, the agent gives up. Longer outlives longer outages.
    join_timeout_s: float = _JOIN_TIMEOUT_S
    # Worker processes of this node; 0: what torch's agent says.
    slots: int = 0
    # How workers meet a change of membership: restart, or in-process.
    reconfigure: str = "restart"
    # In-process mode: a worker that has begun no session so long after its start is named in the agent's log. Large
    # models take long to import: too short a time only warns without need.
    sign_in_warning_s: float = _SIGN_IN_WARNING_S
    # ... and the node's workers are ended and started anew after so long. Longer than anything they load at the start.
    sign_in_limit_s: float = _SIGN_IN_LIMIT_S

    @property
    def job(self) -> str:
        """The run id as a name that the controller accepts."""
        return job_name(self.run_id)

    @classmethod
    def from_parameters(cls, params: RendezvousParameters) -> AgentSettings:
        """Raises ValueError for a value that makes no sense; warns about keys that mean nothing here."""
        if not params.endpoint:
            raise ValueError("no controller was named; give --rdzv-endpoint=HOST[:29400]")
        _check_keys(params.config)
        mode = str(params.get("reconfigure", "restart"))
        if mode not in _MODES:
            raise ValueError(f"--rdzv-conf=reconfigure={mode}; allowed are {' and '.join(_MODES)}")
        return cls(
            endpoints=parse_endpoints(params.endpoint),
            run_id=params.run_id,
            min_nodes=params.min_nodes,
            max_nodes=params.max_nodes,
            address=params.local_addr,
            join_timeout_s=_positive(params.config, "join_timeout", _JOIN_TIMEOUT_S),
            slots=int(_positive(params.config, "slots", 0)),
            reconfigure=mode,
            sign_in_warning_s=_positive(params.config, "sign_in_warning", _SIGN_IN_WARNING_S),
            sign_in_limit_s=_positive(params.config, "sign_in_limit", _SIGN_IN_LIMIT_S),
        )


def _check_keys(config: Mapping[str, object]) -> None:
    unknown = sorted(set(config) - _KNOWN_KEYS)
    if unknown:
        _log.warning("--rdzv-conf: %s ignored; the stretto backend knows %s", ", ".join(unknown), ", ".join(_OUR_KEYS))


def _positive(config: Mapping[str, object], key: str, default: float) -> float:
    """The number under `key`; of the default's kind."""
    if key not in config:
        return default
    kind, words = (int, "whole number") if isinstance(default, int) else (float, "number")
    try:
        value = kind(str(config[key]))
    except ValueError:
        value = -1
    if not 0 < value < float("inf"):
        raise ValueError(f"--rdzv-conf={key}={config[key]}; it must be a {words} above 0")
    return value


def job_name(run_id: str) -> str:
    """`run_id` if it is a DNS label, as job names are; else a label made from it, different for different ids."""
    if _LABEL.fullmatch(run_id):
        return run_id
    readable = re.sub(r"[^a-z0-9]+", "-", run_id.lower())[:50].strip("-")
    digest = hashlib.sha256(run_id.encode()).hexdigest()[:8]
    return f"{readable}-{digest}" if readable else f"job-{digest}"
