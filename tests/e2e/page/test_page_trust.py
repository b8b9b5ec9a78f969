"""What others say stays text on the page, and who may only look cannot act: in a real Chromium."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.browser import Window
from harness.certificates import Authority
from harness.controller import ControllerProcess
from harness.raw_job import RawJob
from playwright.sync_api import Browser, Page, expect
from stretto.client import JobsClient
from stretto_controller.auth.access import Principal, Role
from stretto_controller.auth.tokens import line_of, new_token
from stretto_proto.v1 import types_pb2 as types

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

PATIENCE_MS = 60_000
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def test_hostile_names_and_reasons_stay_text(controller: ControllerProcess, window: Window) -> None:
    page = window.page
    with RawJob(controller) as job:
        job.pair()
        page.goto(f"{controller.http}/#/job/a")
        expect(page.locator(".timeline")).to_contain_text("running", timeout=PATIENCE_MS)
        # Whatever the controller lets through, the page takes it for text: here it gets the worst in every field.
        page.evaluate(
            """async (hostile) => {
              const { JobPage } = await import("/static/job.js");
              const { Fleet } = await import("/static/fleet.js");
              const job = await (await fetch("/api/v1/jobs/a")).json();
              const worst = (key, value) => typeof value === "string" ? hostile : value;
              const evil = JSON.parse(JSON.stringify(job), worst);
              const generation = { incarnation: 1, generation: { number: 1, members: [hostile], scale: 1 },
                cause: hostile, started_s: 1, pause_s: 0, steps: 1, mean_gain: 1, effective_lr: 1, first_tau: 0,
                last_tau: 1, end_reason: hostile };
              const event = { sequence: 1, time_s: 1, kind: hostile, reason: hostile, node_id: hostile, generation: 1 };
              const shown = new JobPage(hostile, () => {});
              document.body.append(shown.root);
              evil.checkpoint = { path: hostile, step: 1, tau: 1, generation: 1, size_bytes: 1, time_s: 1 };
              evil.recommendation = { nodes: 1, reason: hostile, sizes: [], remaining_s: 1 };
              evil.autoscale = { mode: hostile, goal: hostile };
              const points = { time_s: [] };
              shown.take({ anew: false, job: evil, events: [event], generations: [generation], points });
              const fleet = new Fleet();
              document.body.append(fleet.root);
              const row = { name: hostile, phase: hostile, reason: hostile, desired_nodes: 1, active_nodes: 1 };
              fleet.update(new Map([[hostile, row]]));
            }""",
            HOSTILE,
        )
        expect(page.get_by_role("heading", name=HOSTILE)).to_be_visible()
        assert page.locator("img").count() == 0
        assert page.locator("script").count() == 2
        assert "owned" not in page.title()


def test_a_script_in_the_page_would_not_run(controller: ControllerProcess, browser: Browser) -> None:
    """The second line of defence: nothing inline is executed."""
    page = Window(browser).page
    response = page.goto(controller.http)
    assert response is not None
    assert "default-src 'none'" in response.headers["content-security-policy"]
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'document.title=1'}))")
    assert page.title() == "Stretto"
    page.close()


def give(page: Page, token: str) -> None:
    page.locator("#token").fill(token)
    page.get_by_role("button", name="Go on").click()


def scale(page: Page, nodes: int) -> None:
    page.get_by_role("button", name="Scale").click()
    page.get_by_label("Nodes that the job should have").fill(str(nodes))
    page.get_by_role("dialog").get_by_role("button", name="Scale").click()


def test_a_secured_controller_lets_a_viewer_look_and_an_admin_act(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real certificates, real tokens."""
    authority = Authority(tmp_path / "tls")
    issued = authority.issue("IP:127.0.0.1")
    admin, viewer = new_token(), new_token()
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{line_of(Principal(Role.ADMIN), admin)}\n{line_of(Principal(Role.VIEWER), viewer)}\n")
    security = {"TLS_CERT": str(issued.cert), "TLS_KEY": str(issued.key), "TOKENS": str(tokens)}
    settings = {f"STRETTO_SECURITY_{name}": value for name, value in security.items()}
    with ControllerProcess(tmp_path, **settings) as controller:
        monkeypatch.setenv("STRETTO_TLS_CA", str(authority.ca))
        monkeypatch.setenv("STRETTO_TOKEN", admin)
        page = browser.new_page(ignore_https_errors=True)
        assert controller.http.startswith("https://")
        page.goto(controller.http)

        # Who gives none is asked again only when asked to be.
        page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
        expect(page.locator("#connection")).to_contain_text("no token", timeout=PATIENCE_MS)
        page.get_by_role("button", name="Give a token").click()
        give(page, "wrong")
        expect(page.get_by_role("dialog")).to_contain_text("not known here", timeout=PATIENCE_MS)
        give(page, viewer)
        expect(page.get_by_text("No jobs yet.")).to_be_visible(timeout=PATIENCE_MS)
        assert page.evaluate("localStorage.length") == 0, "a token is not kept beyond its tab"

        with JobsClient(controller.grpc) as client:
            client.create("a", types.JobSpec(min_nodes=1, max_nodes=4, mode=types.RECONFIGURE_MODE_IN_PROCESS))
            page.get_by_role("link", name="a", exact=True).click(timeout=PATIENCE_MS)
            scale(page, 3)
            expect(page.get_by_role("dialog")).to_contain_text("a token of viewer may not do this", timeout=PATIENCE_MS)
            page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
            expect(page.locator(".answer")).to_contain_text("Not done: a token of viewer", timeout=PATIENCE_MS)
            assert client.get("a").desired_nodes == 4
            scale(page, 3)
            give(page, admin)
            expect(page.locator(".answer")).to_contain_text("3 nodes are wanted now", timeout=PATIENCE_MS)
            assert client.get("a").desired_nodes == 3
        page.close()
