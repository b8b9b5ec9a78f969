"""What an ElasticTrainingJob goes through, told to an operator by an API server and a controller in memory."""

from __future__ import annotations

import pytest
from etj.etj_site import Site
from etj.memory_server import Call
from stretto_operator import names
from stretto_operator.requests import Create, Delete, Pause, Resume, Scale
from stretto_operator.server import ApiError

JOB = names.controller_job("default", "digits")


@pytest.fixture
def site() -> Site:
    return Site()


async def test_a_job_gets_its_pods_and_the_controller_is_told_first(site: Site) -> None:
    site.apply(nodes=3)
    await site.look()
    assert site.pods() == []
    assert isinstance(site.controller.requests[0], Create)
    await site.settle()
    assert site.pods() == ["digits-0", "digits-1", "digits-2"]
    site.run_pods()
    site.train(tau=12.3456, gain=2.5)
    await site.settle()
    status = site.status()
    assert (status["phase"], status["nodes"], status["readyNodes"], status["scale"]) == ("Running", 3, 3, 3.0)
    assert status["selector"] == "stretto.dev/job-name=digits"
    assert status["tau"] == 12.35


async def test_an_idle_cluster_sees_no_writes(site: Site) -> None:
    await site.begin(nodes=3)
    before = len(site.server.writes)
    for _ in range(20):
        site.now_s += 30
        await site.look()
    assert len(site.server.writes) == before


async def test_five_pods_take_less_than_three_writes_each(site: Site) -> None:
    await site.begin(nodes=5)
    assert len(site.server.writes) < 15


async def test_figures_are_written_only_so_often(site: Site) -> None:
    await site.begin()
    before = len(site.server.writes)
    for second in range(60):
        site.say(tau=100.0 + second)
        await site.look()
        site.now_s += 1
    assert len(site.server.writes) - before <= 7


async def test_growth_is_told_at_once_and_shrinking_after_the_pods_have_gone(site: Site) -> None:
    await site.begin(nodes=2)
    site.server.change(names.KIND, "digits", spec={"nodes": 4})
    await site.look()
    assert site.controller.requests[-1] == Scale(JOB, 4)
    await site.settle()
    site.run_pods()
    site.train()
    site.server.change(names.KIND, "digits", spec={"nodes": 2})
    asked = len(site.controller.requests)
    await site.look()
    assert len(site.controller.requests) == asked
    site.run_pods()
    await site.settle()
    assert site.pods() == ["digits-0", "digits-1"]
    assert site.controller.requests[-1] == Scale(JOB, 2)


async def test_shrinking_keeps_rank_0_and_lets_go_who_does_not_train(site: Site) -> None:
    await site.begin(nodes=4)
    ranks = {"digits-3": 0, "digits-1": 1, "digits-2": 2}
    views = site.controller.jobs[JOB].nodes
    site.say(nodes={name: type(next(iter(views.values())))("active", rank) for name, rank in ranks.items()})
    site.server.change(names.KIND, "digits", spec={"nodes": 2})
    await site.look()
    site.run_pods()
    await site.settle()
    assert site.pods() == ["digits-1", "digits-3"]


async def test_a_deleted_pod_comes_back_under_its_name(site: Site) -> None:
    await site.begin(nodes=2)
    uid = site.server.all("Pod")["digits-1"]["metadata"]["uid"]
    site.server.remove("Pod", "digits-1")
    await site.settle()
    assert site.server.all("Pod")["digits-1"]["metadata"]["uid"] != uid


async def test_a_pod_on_a_lost_node_is_deleted_by_force_and_replaced(site: Site) -> None:
    await site.begin(nodes=2)
    pod = site.server.all("Pod")["digits-1"]
    await site.server.delete(site.reconciler.caches.pods.kind, "default", "digits-1", uid=pod["metadata"]["uid"])
    await site.settle()
    assert site.server.all("Pod")["digits-1"]["metadata"]["uid"] == pod["metadata"]["uid"]
    site.now_s += 90
    await site.settle()
    assert site.server.all("Pod")["digits-1"]["metadata"]["uid"] != pod["metadata"]["uid"]


async def test_an_evicted_pod_is_replaced_and_not_counted(site: Site) -> None:
    await site.begin(nodes=2)
    gone = {"phase": "Failed", "reason": "Evicted", "message": "low on memory"}
    site.server.change("Pod", "digits-1", status=gone)
    await site.settle()
    assert site.pods() == ["digits-0", "digits-1"]
    assert "failures" not in site.status()
    assert any(each["reason"] == "PodReplaced" for each in site.server.all("Event").values())


async def test_a_pod_that_runs_out_of_memory_is_counted_named_and_replaced_later(site: Site) -> None:
    await site.begin(nodes=2)
    uid = site.server.all("Pod")["digits-1"]["metadata"]["uid"]
    site.end_pod("digits-1", 137, reason="OOMKilled")
    await site.look()
    assert site.condition("Degraded")["reason"] == "OOMKilled"
    assert site.status()["failures"][0]["count"] == 1
    assert site.server.all("Pod")["digits-1"]["metadata"]["uid"] == uid
    site.now_s += 15
    await site.settle()
    assert site.server.all("Pod")["digits-1"]["metadata"]["uid"] != uid
    assert site.condition("Degraded")["status"] == "False"


async def test_a_pod_that_fails_too_often_is_given_up_and_the_others_go_on(site: Site) -> None:
    await site.begin(nodes=2, backoffLimit=1)
    for _ in range(2):
        site.end_pod("digits-1", 1)
        await site.look()
        site.now_s += 60
        await site.settle()
        site.run_pods()
    assert site.condition("Degraded")["reason"] == "Error"
    assert site.status()["phase"] == "Running"
    site.end_pod("digits-0", 1)
    await site.look()
    site.now_s += 60
    await site.settle()
    site.run_pods()
    site.end_pod("digits-0", 1)
    await site.settle()
    assert site.status()["phase"] == "Failed"
    assert site.condition("Failed")["reason"] == "BackoffLimitExceeded"
    assert site.condition("Failed")["message"].startswith("pod digits-0 failed 2 times, last with exit code 1 (Error)")


async def test_an_attempt_that_the_controller_calls_failed_is_made_again_and_then_not(site: Site) -> None:
    await site.begin(nodes=2, backoffLimit=1)
    for attempt in (1, 2):
        site.say(phase="failed", reason="the workers of all nodes failed")
        await site.settle()
        if attempt == 1:
            assert site.status()["phase"] == "Pending"
            site.run_pods()
            await site.settle()
            site.run_pods()
            assert len(site.pods()) == 2
            site.train()
            site.say(generation=site.controller.jobs[JOB].generation + 5)
            await site.settle()
            assert site.status()["phase"] == "Running"
    assert site.status()["phase"] == "Failed"
    assert "the workers of all nodes failed" in site.condition("Failed")["message"]


async def test_an_unschedulable_pod_is_named_and_holds_up_nobody(site: Site) -> None:
    site.apply(nodes=2)
    await site.settle()
    why = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}
    site.server.change("Pod", "digits-1", status={"phase": "Pending", "conditions": [why]})
    site.run_pods()
    site.train()
    await site.settle()
    assert site.status()["phase"] == "Running"
    assert site.condition("Degraded")["message"] == "digits-1: Unschedulable: 0/3 nodes are available"


async def test_the_controllers_word_ends_the_job_and_its_time_to_live_removes_it(site: Site) -> None:
    await site.begin(nodes=2, ttlSecondsAfterFinished=100)
    site.end_pod("digits-0")
    await site.look()
    assert site.status()["phase"] == "Running"
    site.end_pod("digits-1")
    site.say(phase="succeeded", reason="target reached")
    await site.settle()
    assert site.condition("Succeeded")["status"] == "True"
    assert site.pods() == ["digits-0", "digits-1"]
    site.now_s += 101
    await site.look()
    assert site.server.all(names.KIND) == {}


async def test_pods_that_end_well_end_a_job_that_never_spoke_to_the_controller(site: Site) -> None:
    site.apply(nodes=2)
    await site.settle()
    site.run_pods()
    site.end_pod("digits-0")
    await site.settle()
    assert site.status()["phase"] == "Pending"
    site.end_pod("digits-1")
    await site.settle()
    assert site.condition("Succeeded")["reason"] == "PodsSucceeded"


async def test_a_drained_pod_is_replaced_while_training_goes_on(site: Site) -> None:
    await site.begin(nodes=2)
    uid = site.server.all("Pod")["digits-1"]["metadata"]["uid"]
    site.end_pod("digits-1")
    await site.settle()
    assert site.server.all("Pod")["digits-1"]["metadata"]["uid"] == uid
    site.now_s += 40
    await site.settle()
    assert site.server.all("Pod")["digits-1"]["metadata"]["uid"] != uid


async def test_suspend_pauses_then_takes_the_pods_and_resume_brings_them_back(site: Site) -> None:
    await site.begin(nodes=2)
    site.server.change(names.KIND, "digits", spec={"suspend": True})
    await site.look()
    assert site.controller.requests[-1] == Pause(JOB)
    assert len(site.pods()) == 2
    await site.look()
    site.run_pods()
    await site.settle()
    assert site.pods() == []
    assert site.status()["phase"] == "Suspended"
    assert site.condition("Suspended")["status"] == "True"
    site.server.change(names.KIND, "digits", spec={"suspend": False})
    await site.settle()
    assert Resume(JOB) in site.controller.requests
    assert site.pods() == ["digits-0", "digits-1"]
    assert site.condition("Suspended")["status"] == "False"


async def test_a_job_that_begins_suspended_has_no_pods(site: Site) -> None:
    site.apply(suspend=True)
    await site.settle()
    assert site.pods() == []
    assert site.status()["phase"] == "Suspended"


async def test_a_suspended_job_gives_its_pods_back_though_the_controller_is_away(site: Site) -> None:
    await site.begin(nodes=2)
    site.controller.reachable = False
    site.server.change(names.KIND, "digits", spec={"suspend": True})
    await site.settle()
    assert len(site.pods()) == 2
    site.now_s += site.limits.suspend_limit_s
    await site.look()
    site.run_pods()
    await site.settle()
    assert site.pods() == []


async def test_a_pause_by_hand_is_left_alone(site: Site) -> None:
    await site.begin(nodes=2)
    site.say(phase="paused")
    await site.settle()
    assert site.status()["phase"] == "Paused"
    assert Resume(JOB) not in site.controller.requests


async def test_without_a_controller_pods_stay_and_the_condition_says_so(site: Site) -> None:
    await site.begin(nodes=2)
    site.controller.reachable = False
    await site.settle()
    assert site.pods() == ["digits-0", "digits-1"]
    assert site.condition("ControllerReachable")["status"] == "False"
    assert site.status()["phase"] == "Running"


async def test_what_the_controller_refuses_is_said_on_the_job(site: Site) -> None:
    site.controller.refusal = "max_nodes is 8 here, but the job runs with max_nodes 4"
    site.apply()
    await site.look()
    await site.look()
    assert site.condition("Accepted")["message"] == f"{site.controller.refusal} (the controller calls it {JOB})"
    assert site.pods() == []


async def test_an_earlier_run_under_the_same_name_is_not_taken_for_this_one(site: Site) -> None:
    await site.begin()
    site.say(phase="succeeded", reason="target reached")
    await site.settle()
    site.server.remove(names.KIND, "digits")
    site.start_operator()
    site.apply(reconfigure="")
    await site.settle()
    assert site.status()["phase"] == "Pending"
    assert site.pods() == ["digits-0"]


async def test_a_deleted_jobs_record_goes_unless_checkpoints_need_it(site: Site) -> None:
    await site.begin("digits")
    await site.begin("kept", checkpoint={"url": "s3://bucket/kept"})
    for name in ("digits", "kept"):
        site.server.remove(names.KIND, name)
        site.say(name, nodes={})
        await site.look(name)
    assert Delete(JOB) in site.controller.requests
    assert Delete(names.controller_job("default", "kept")) not in site.controller.requests


async def test_a_job_that_is_being_deleted_gets_nothing_any_more(site: Site) -> None:
    await site.begin(nodes=2)
    site.server.change(names.KIND, "digits", metadata={"deletionTimestamp": "2027-01-15T08:00:00Z"})
    site.server.remove("Pod", "digits-0")
    before = len(site.server.writes)
    await site.settle()
    assert len(site.server.writes) == before


async def test_what_others_made_is_never_deleted(site: Site) -> None:
    foreign = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "digits-9", "labels": {**names.labels("digits"), names.INDEX_LABEL: "9"}},
        "spec": {},
    }
    site.server.add(foreign)
    site.server.add({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "digits-stretto"}, "data": {}})
    site.apply()
    await site.look()
    await site.look()
    await site.look()
    assert "digits-9" in site.pods()
    assert site.server.all("Secret")["digits-stretto"]["data"] == {}
    assert "does not belong to this job" in site.condition("Degraded")["message"]
    assert "digits-0" not in site.pods()
    site.start_operator()
    site.server.remove("Secret", "digits-stretto")
    await site.settle()
    assert site.server.all("Secret")["digits-stretto"]["data"]
    assert "digits-0" in site.pods()


async def test_a_refused_pod_is_told_in_the_api_servers_words(site: Site) -> None:
    def refuse(call: Call) -> None:
        if call.verb == "create" and call.kind.kind == "Pod":
            raise ApiError(403, "Forbidden", "exceeded quota: pods=0")

    site.server.before = refuse
    site.apply()
    for _ in range(4):
        await site.look()
        site.now_s += 3
    assert site.condition("Degraded")["message"] == "Pod digits-0: exceeded quota: pods=0"
    site.server.before = lambda call: None
    await site.settle()
    assert site.pods() == ["digits-0"]
    assert site.condition("Degraded")["status"] == "False"


async def test_a_disruption_budget_comes_and_goes_with_the_wish(site: Site) -> None:
    await site.begin(nodes=3, minNodes=2, podDisruptionBudget=True)
    assert site.server.all("PodDisruptionBudget")["digits"]["spec"]["minAvailable"] == 2
    site.server.change("PodDisruptionBudget", "digits", spec={"minAvailable": 0})
    await site.settle()
    assert site.server.all("PodDisruptionBudget")["digits"]["spec"]["minAvailable"] == 2
    site.server.change(names.KIND, "digits", spec={"podDisruptionBudget": False})
    await site.settle()
    assert site.server.all("PodDisruptionBudget") == {}


async def test_where_the_controller_may_act_it_says_how_many_pods_there_are(site: Site) -> None:
    await site.begin(nodes=2, autoscale={"mode": "act", "efficiencyFloor": 0.6})
    assert site.controller.jobs[JOB].autoscale.mode == "act"
    site.say(desired_nodes=4)
    await site.settle()
    assert len(site.pods()) == 4
    assert not any(isinstance(each, Scale) for each in site.controller.requests)
    site.controller.reachable = False
    site.start_operator()
    unknown, site.controller.jobs = site.controller.jobs, {}
    await site.settle()
    assert len(site.pods()) == 4
    site.controller.jobs, site.controller.reachable = unknown, True
    site.say(desired_nodes=1)
    await site.settle()
    site.run_pods()
    await site.settle()
    assert site.pods() == ["digits-0"]
