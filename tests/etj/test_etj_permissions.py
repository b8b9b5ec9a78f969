"""The operator's roles: what it did in its tests' stories, and nothing beyond."""

from __future__ import annotations

from pathlib import Path

import yaml
from etj.etj_site import Site
from etj.memory_server import Call
from stretto_operator import names
from stretto_operator.election import Election, LeaseSettings
from stretto_operator.server import BUDGET, JOB, POD

_RBAC = Path(__file__).parents[2] / "k8s" / "rbac"


def _granted(file: str) -> set[tuple[str, str, str]]:
    """(API group, resource, verb) of every rule."""
    rules = [rule for document in yaml.safe_load_all((_RBAC / file).read_text()) for rule in document.get("rules", ())]
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def _used(calls: list[Call]) -> set[tuple[str, str, str]]:
    found = set()
    for call in calls:
        group = call.kind.api.removeprefix("/apis/").rpartition("/")[0] if call.kind.api.startswith("/apis/") else ""
        resource = "/".join(filter(None, (call.kind.plural, call.subresource)))
        found.add((group, resource, call.verb))
    return found


async def test_the_cluster_role_grants_what_was_used_and_nothing_else() -> None:
    site = Site()
    # A life with everything in it: tokens, a budget that comes, is mended and goes, failures, the end.
    site.server.add({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "digits-stretto"}, "data": {}})
    site.apply(nodes=2, podDisruptionBudget=True, ttlSecondsAfterFinished=1)
    await site.look()
    await site.look()
    site.server.remove("Secret", "digits-stretto")
    await site.settle()
    site.run_pods()
    site.train()
    site.server.change("PodDisruptionBudget", "digits", spec={"minAvailable": 0})
    await site.settle()
    site.end_pod("digits-1", 1)
    site.now_s += 20
    await site.settle()
    site.server.change(names.KIND, "digits", spec={"podDisruptionBudget": False})
    await site.settle()
    site.say(phase="succeeded")
    await site.settle()
    site.now_s += 5
    await site.look()
    # `Site.see` lists what `Watch` lists, and then watches.
    site.server.calls += [Call("watch", kind) for kind in (JOB, POD, BUDGET)]
    assert _used(site.server.calls) == _granted("cluster-role.yaml")


async def test_the_leaders_role_grants_what_an_election_uses() -> None:
    site = Site()
    settings = LeaseSettings("default", "stretto-operator", "first")
    election = Election(site.server, settings, lambda: site.now_s)
    await election.attempt()
    await election.attempt()
    await election.resign()
    assert _used(site.server.calls) == _granted("leader-role.yaml")


def test_no_secret_can_be_read() -> None:
    granted = _granted("cluster-role.yaml") | _granted("leader-role.yaml")
    assert not granted & {("", "secrets", verb) for verb in ("get", "list", "watch")}
