"""The page in a real Chromium: a job's story is watched, steered, and found again after the controller's restart."""

from __future__ import annotations

import hashlib
import itertools
import time
from importlib.resources import files
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from harness.agents import Agents
from harness.browser import Window, take_picture
from harness.controller import ControllerProcess
from harness.live_job import LiveJob
from harness.raw_job import RawJob
from playwright.sync_api import Browser, Page, expect
from stretto_proto.v1 import jobs_pb2 as jobs
from stretto_proto.v1 import types_pb2 as types

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

PATIENCE_MS = 60_000
# uPlot 1.6.32 as npm has it.
VENDORED = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "uPlot.LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}


def train(job: RawJob, first: int, last: int) -> None:
    """Steps of worker n0, a tenth of tau apart, as a worker reports them."""
    worker = job.workers["n0"]
    for step in range(first, last):
        worker.say(
            progress=types.Progress(
                generation=worker.generation,
                step=step,
                tau=1.5 * step,
                gain=1.5,
                scale=2.0,
                loss=10.0 / step,
                effective_lr=[0.15],
                base_lr=[0.1],
                samples=16 * step,
                generation_steps=step,
                generation_gain_sum=1.5 * step,
            )
        )
        worker.alive(step, median_step_s=0.02)
        time.sleep(0.01)


def points(controller: ControllerProcess) -> int:
    """Of job a's curve: a busy controller takes many steps in one go, and keeps one of them."""
    return len(controller.get("/api/v1/jobs/a/history")["points"]["tau"])


def axe(page: Page) -> list[str]:
    """What axe-core finds that is serious or worse."""
    found = Axe().run(page).response["violations"]
    return [
        f"{violation['impact']}: {violation['id']}: {violation['nodes'][0]['html']}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
    ]


def lines(page: Page) -> list[int]:
    """How many pixels of each chart have a strong colour, as lines have and axes have not."""
    found: list[int] = page.evaluate(
        """() => [...document.querySelectorAll(".charts canvas")].map((canvas) => {
          const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          let count = 0;
          for (let i = 0; i < pixels.length; i += 4) {
            const [r, g, b] = pixels.slice(i, i + 3);
            if (pixels[i + 3] > 128 && Math.max(r, g, b) - Math.min(r, g, b) > 60) count += 1;
          }
          return count;
        })"""
    )
    return found


@pytest.mark.parametrize("name", VENDORED)
def test_the_vendored_chart_library_is_what_its_authors_published(name: str) -> None:
    content = (files("stretto_controller.web") / "static" / "vendor" / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == VENDORED[name]


def test_a_story_is_watched_and_steered(browser: Browser, tmp_path: Path) -> None:
    """Real workers: a node joins, one is killed, a click scales the job, the controller is restarted."""
    with (
        ControllerProcess(tmp_path, STRETTO_SERVICE_POINT_INTERVAL_S="0.2") as controller,
        Agents(tmp_path / "agents", controller.grpc, nnodes="1:3") as agents,
    ):
        window = Window(browser)
        page = window.page
        page.goto(controller.http)
        expect(page.get_by_text("No jobs yet.")).to_be_visible(timeout=PATIENCE_MS)
        job = LiveJob(tmp_path, controller, agents, target_tau=5000, checkpoint_steps=10)
        job.pace(0.05)
        job.start("n0")
        page.get_by_role("link", name="job", exact=True).click()
        expect(page.get_by_role("heading", name="job", exact=True)).to_be_visible(timeout=PATIENCE_MS)
        expect(page.locator(".tag")).to_have_text("running", timeout=PATIENCE_MS)

        # Charts move.
        before = page.locator("figure[data-chart=tau] .values").inner_text()
        expect(page.locator("figure[data-chart=tau] .values")).not_to_have_text(before, timeout=PATIENCE_MS)

        # A node joins; another is killed.
        job.start("n1")
        agents.wait_for_steps("n0", "n1", world_size=2)
        expect(page.locator("article .figures > div", has_text="workers").locator("dd")).to_have_text(
            "2", timeout=PATIENCE_MS
        )
        agents.kill_node("n1")
        expect(page.locator(".timeline")).to_contain_text("node lost", timeout=PATIENCE_MS)
        expect(page.locator("article .figures > div", has_text="workers").locator("dd")).to_have_text(
            "1", timeout=PATIENCE_MS
        )

        # A click changes what the job wants.
        page.get_by_role("button", name="Scale").click()
        page.get_by_label("Nodes that the job should have").fill("1")
        page.get_by_role("dialog").get_by_role("button", name="Scale").click()
        expect(page.get_by_text("1 node is wanted now.")).to_be_visible(timeout=PATIENCE_MS)
        assert controller.get("/api/v1/jobs/job")["desired_nodes"] == 1

        take_picture(page, "story-1280")
        page.set_viewport_size({"width": 390, "height": 844})
        page.emulate_media(color_scheme="dark", reduced_motion="reduce")
        take_picture(page, "story-390")
        page.set_viewport_size({"width": 1280, "height": 900})

        # Another has it save, and says where.
        before_s = controller.get("/api/v1/jobs/job")["checkpoint"]["time_s"]
        page.get_by_role("button", name="Checkpoint").click()
        expect(page.get_by_text("It saves after a step.")).to_be_visible(timeout=PATIENCE_MS)
        job.until(lambda: controller.get("/api/v1/jobs/job")["checkpoint"]["time_s"] > before_s, "it did not save")

        # The controller is killed: the page says so, heals, and keeps what it knew.
        known = len(controller.get("/api/v1/jobs/job/history")["points"]["tau"])
        assert known > 10
        controller.kill()
        expect(page.locator("#connection")).to_contain_text("no answer", timeout=PATIENCE_MS)
        controller.start()
        expect(page.locator("#connection")).to_contain_text("live", timeout=PATIENCE_MS)
        before = page.locator("figure[data-chart=tau] .values").inner_text()
        expect(page.locator("figure[data-chart=tau] .values")).not_to_have_text(before, timeout=PATIENCE_MS)
        shown = page.locator(".timeline li").evaluate_all("lines => lines.map((line) => Number(line.dataset.sequence))")
        kept = [event for event in controller.get("/api/v1/jobs/job/events")["events"] if event["sequence"] <= shown[0]]
        # The steps of one change, which have one reason, are one entry.
        ends = [one["sequence"] for one, after in itertools.pairwise(kept) if one["reason"] != after["reason"]]
        assert shown[::-1] == [*ends, kept[-1]["sequence"]], "each event once"
        window.close()

        # Who opens the page only now sees the whole run, as far as it was saved.
        window = Window(browser)
        window.page.goto(f"{controller.http}/#/job/job")
        expect(window.page.locator(".timeline")).to_contain_text("node lost", timeout=PATIENCE_MS)
        assert len(controller.get("/api/v1/jobs/job/history")["points"]["tau"]) > 10
        window.close()


def test_actions_ask_first_and_a_cancelled_one_changes_nothing(controller: ControllerProcess, window: Window) -> None:
    page = window.page
    with RawJob(controller) as job:
        job.pair()
        page.goto(f"{controller.http}/#/job/a")
        expect(page.locator(".tag")).to_have_text("running", timeout=PATIENCE_MS)
        page.get_by_role("button", name="Delete").click()
        expect(page.get_by_role("dialog")).to_contain_text("forgotten")
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_have_count(0)
        page.get_by_role("button", name="Pause").click()
        page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
        expect(page.get_by_role("dialog")).to_have_count(0)
        shown = controller.get("/api/v1/jobs/a")
        assert (shown["phase"], shown["paused"]) == ("running", False)

        page.get_by_role("button", name="Pause").click()
        page.get_by_role("dialog").get_by_role("button", name="Pause").click()
        expect(page.get_by_role("button", name="Resume")).to_be_visible(timeout=PATIENCE_MS)
        assert controller.get("/api/v1/jobs/a")["paused"]
        page.get_by_role("button", name="Resume").click()
        expect(page.get_by_role("button", name="Pause…")).to_be_visible(timeout=PATIENCE_MS)

        page.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(page.locator(".answer")).to_contain_text("deleted", timeout=PATIENCE_MS)
        assert controller.get("/api/v1/jobs")["jobs"] == []


def test_a_refusal_is_shown_in_the_controllers_own_words(controller: ControllerProcess, window: Window) -> None:
    page = window.page
    with RawJob(controller) as job:
        job.pair()
        page.goto(f"{controller.http}/#/job/a")
        page.get_by_role("button", name="Scale").click()
        field = page.get_by_label("Nodes that the job should have")
        field.evaluate("field => field.removeAttribute('max')")
        field.fill("99")
        page.get_by_role("dialog").get_by_role("button", name="Scale").click()
        expect(page.locator(".answer")).to_contain_text("99 nodes were asked for", timeout=PATIENCE_MS)
        # The refused request shows in the console; that is all.
        assert not window.errors


def test_everything_can_be_done_from_the_keyboard(controller: ControllerProcess, window: Window) -> None:
    page = window.page
    with RawJob(controller) as job:
        job.pair()
        page.goto(controller.http)
        expect(page.get_by_role("link", name="a", exact=True)).to_be_visible(timeout=PATIENCE_MS)
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.get_by_role("link", name="a", exact=True).focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Scale")).to_be_enabled(timeout=PATIENCE_MS)
        page.get_by_role("button", name="Scale").focus()
        page.keyboard.press("Enter")
        page.keyboard.press("Control+A")
        page.keyboard.type("1")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.locator(".answer")).to_contain_text("1 node is wanted", timeout=PATIENCE_MS)


def show_sizes(page: Page) -> None:
    """The card of sizes with a recommendation: a real one takes minutes of different sizes."""
    page.evaluate(
        """async () => {
          const { sizePart } = await import("/static/size.js");
          const size = (nodes, progress_rate, seen, extrapolated) => ({
            nodes, world_size: nodes, scale: nodes, gain: 1 + nodes / 3, step_seconds: 0.05, progress_rate,
            marginal_efficiency: 1 / nodes, seen, extrapolated });
          const sizes = [
            size(1, 20, true, false), size(2, 31, true, false), size(3, 38, false, false), size(8, 52, false, true)];
          const reason = "2 nodes: a third node would bring 33 % of what one brings alone";
          const recommendation = { nodes: 2, reason, sizes, remaining_s: 61 };
          const autoscale = { mode: "recommend", goal: "progress" };
          const part = sizePart({ recommendation, autoscale, desired_nodes: 3 });
          part.id = "sizes";
          document.querySelector("article section").append(part);
        }"""
    )
    sizes = page.locator("#sizes")
    for words in ("2 nodes: a third node would bring 33 %", "done in 1 min 1 s", "2 (best)", "3 (wanted)", "a guess"):
        expect(sizes).to_contain_text(words)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_the_page_is_readable_for_everyone(
    controller: ControllerProcess, browser: Browser, width: int, scheme: str
) -> None:
    window = Window(browser, width=width, scheme=scheme)
    page = window.page
    with RawJob(controller, target_tau=400) as job:
        spec = types.JobSpec(min_nodes=1, max_nodes=4, mode=types.RECONFIGURE_MODE_IN_PROCESS)
        job.request("CreateJob", jobs.CreateJobRequest(job="another", spec=spec))
        job.comes("n0", "n1")
        for worker in job.workers.values():
            worker.place()
        train(job, 1, 60)
        while points(controller) < 10:
            train(job, 60, 61)
        page.goto(controller.http)
        expect(page.get_by_role("link", name="a", exact=True)).to_be_visible(timeout=PATIENCE_MS)
        assert axe(page) == []
        take_picture(page, f"fleet-{width}-{scheme}")
        page.get_by_role("link", name="a", exact=True).click()
        expect(page.locator("figure[data-chart=loss] .values")).to_contain_text("loss 0.", timeout=PATIENCE_MS)
        show_sizes(page)
        assert axe(page) == []
        page.get_by_role("button", name="Scale").click()
        assert axe(page) == []
        page.keyboard.press("Escape")
        take_picture(page, f"job-{width}-{scheme}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
        assert min(lines(page)) > 250, "a chart is empty"
    window.close()
