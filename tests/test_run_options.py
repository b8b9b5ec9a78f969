"""`stretto run` under an environment that says how torchrun is to be run, as in the pods of an ElasticTrainingJob."""

from __future__ import annotations

import pytest
from stretto.commands.run import build_parser, launch_node


@pytest.fixture
def pod(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PET_RDZV_BACKEND": "stretto",
        "PET_RDZV_ENDPOINT": "stretto-controller:29400",
        "PET_RDZV_ID": "digits-0a1b2c3d4e",
        "PET_NNODES": "2:5",
        "PET_NPROC_PER_NODE": "4",
        "PET_RDZV_CONF": "join_timeout=900,reconfigure=restart",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("pod")
def test_the_environments_mode_is_the_default_and_an_option_goes_before_it() -> None:
    parsed = build_parser().parse_args(["train.py"])
    assert (parsed.reconfigure, parsed.nnodes, parsed.nproc_per_node) == ("restart", "2:5", "4")
    assert build_parser().parse_args(["--reconfigure", "in-process", "train.py"]).reconfigure == "in-process"


@pytest.mark.usefixtures("pod")
def test_a_mode_among_the_options_of_the_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="use --reconfigure"):
        launch_node(["--rdzv-conf=reconfigure=in-process", "train.py"])


def test_without_such_an_environment_workers_live_on() -> None:
    assert build_parser().parse_args(["train.py"]).reconfigure == "in-process"
