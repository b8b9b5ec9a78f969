"""`stretto run`: one node of a job, by torchrun's launcher with an agent of ours."""

from __future__ import annotations

import contextlib
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer

from stretto import credentials
from stretto.channel import ENDPOINT_VARIABLE
from stretto.errors import Fatal
from stretto.rendezvous.settings import job_name

_JOB_VARIABLE = "STRETTO_JOB"
_DATA_ROOT = Path(".stretto/run")
_SETTLED_BY_US = ("rdzv_backend", "rdzv_endpoint", "rdzv_id", "standalone")


def register(app: typer.Typer) -> None:
    """Add the command to `stretto`. Its options are torchrun's, so torch's own parser reads them."""
    everything = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}
    app.command("run", context_settings=everything, add_help_option=False)(run)


def run(context: typer.Context) -> None:
    """Train on this node: torchrun, with elastic membership. `stretto run --help` lists the options."""
    try:
        code = launch_node(context.args)
    except (Fatal, ValueError) as error:
        typer.echo(f"stretto run: {error}", err=True)
        code = 1
    raise typer.Exit(code)


def launch_node(arguments: Sequence[str]) -> int:
    """Run one node as the command line says, and return the exit code. Raises ValueError for a bad option."""
    # Late: torch takes more than a second to import, and other subcommands do not need it.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import config_from_args

    from stretto.agent import launch

    parser = build_parser()
    args = parser.parse_args(list(arguments))
    _refuse_what_is_settled(parser, args)
    job = args.job or os.environ.get(_JOB_VARIABLE) or job_name(Path(args.training_script).stem)
    given = args.endpoint or os.environ.get(ENDPOINT_VARIABLE)
    with _controller(given, job) as endpoint:
        args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id = "stretto", endpoint, job
        args.rdzv_conf = ",".join(filter(None, (args.rdzv_conf, f"reconfigure={args.reconfigure}")))
        config, entrypoint, entrypoint_args = config_from_args(args)
        try:
            return launch(config, entrypoint, entrypoint_args, owns_job=given is None) or 0
        except ChildFailedError as error:
            # torch's table of what failed, and how.
            print(error, file=sys.stderr)
        except RendezvousError as error:
            print(f"stretto run: {error}", file=sys.stderr)
        return 1


def build_parser() -> ArgumentParser:
    """torchrun's parser, with our options first and without those that we settle ourselves."""
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    parser.prog = "stretto run"
    parser.description = "Run one node of an elastic job. All options of torchrun work, except --rdzv-backend, "
    parser.description += "--rdzv-endpoint, --rdzv-id and --standalone, which --endpoint and --job replace."
    ours = parser.add_argument_group("stretto")
    ours.add_argument(
        "--endpoint",
        metavar="HOST[:29400]",
        help=f"The controller. Default: the variable {ENDPOINT_VARIABLE}; without it, a controller on free ports of "
        f"this machine, which ends with this node and keeps its data in {_DATA_ROOT}/JOB.",
    )
    ours.add_argument(
        "--job",
        help=f"The job's name, a DNS label. Default: the variable {_JOB_VARIABLE}; without it, the script's name.",
    )
    ours.add_argument(
        "--reconfigure",
        choices=("restart", "in-process"),
        default=_mode_of(parser.get_default("rdzv_conf")) or "in-process",
        help="How workers meet a change of membership. in-process, the default: they live on, and change generation; "
        "the script has to train with stretto.ElasticTrainer or a live session. restart: new ones are started, which "
        "works with any script.",
    )
    return parser


def _mode_of(rdzv_conf: str) -> str:
    """The mode that --rdzv-conf names; empty where it names none."""
    pairs = (pair.partition("=") for pair in rdzv_conf.split(","))
    return next((value.strip() for key, _, value in pairs if key.strip() == "reconfigure"), "")


def _refuse_what_is_settled(parser: ArgumentParser, args: Namespace) -> None:
    for name in _SETTLED_BY_US:
        if getattr(args, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} is settled by stretto run; use --endpoint and --job")
    # Where PET_RDZV_CONF says it, as the Kubernetes operator does, --reconfigure has it as its default.
    if args.rdzv_conf != parser.get_default("rdzv_conf") and _mode_of(args.rdzv_conf):
        raise ValueError(f"--rdzv-conf={args.rdzv_conf}: the mode is settled by stretto run; use --reconfigure")


@contextlib.contextmanager
def _controller(given: str | None, job: str) -> Iterator[str]:
    """The endpoint to use: the one that was given, or that of a controller which runs meanwhile."""
    if given:
        yield given
        return
    from stretto.embedded import EmbeddedController

    # It is on loopback and ends with this node: what belongs to a controller elsewhere would keep us out.
    for name in credentials.VARIABLES:
        os.environ.pop(name, None)
    with EmbeddedController(_DATA_ROOT / job_name(job)) as controller:
        typer.echo(f"job {job}: page {controller.url}/, metrics {controller.url}/metrics")
        typer.echo(f"more nodes: stretto run --endpoint {controller.endpoint} --job {job} ...")
        yield controller.endpoint
