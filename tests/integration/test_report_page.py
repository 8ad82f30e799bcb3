"""The report's page in a real browser: Debian's chromium-headless-shell, driven by playwright."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bootseer_slurm.report.render.html import to_html
from bootseer_slurm.report.startup.analyse import analyse
from scripts.lib.bench.made_start import made_report, made_run
from tests.unit.test_report_terminal import make_with_peers

BROWSER = shutil.which("chromium-headless-shell")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not BROWSER, reason="no chromium-headless-shell")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # Chromium's sandbox does not run as root.
        running = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield running
        running.close()


class Page:
    """A report that was opened, and what the browser complained of."""

    def __init__(self, browser: Any, folder: Path, text: str, scheme: str = "light") -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        file = folder / "report.html"
        file.write_text(text)
        self.tab = browser.new_page(viewport={"width": 1240, "height": 1800}, color_scheme=scheme)
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("dialog", lambda dialog: (self.complaints.append("dialog"), dialog.dismiss()))
        # What the policy forbids is asked for, and fails at once.
        self.tab.on("requestfinished", lambda request: self.requests.append(request.url))
        self.tab.goto(file.as_uri())
        self.tab.wait_for_selector("body[data-drawn]")
        self.tab.wait_for_load_state("networkidle")
        self.requests.remove(file.as_uri())

    def row_color(self, row: int, rows: int, x: float) -> list[int]:
        """The colour of the canvas in a node's row; x: share of its width."""
        return list(
            self.tab.evaluate(
                """([row, rows, x]) => {
                    const canvas = document.getElementById("canvas"), pen = canvas.getContext("2d");
                    const y = 26 + (canvas.height - 26) * (row + 0.5) / rows;
                    return Array.from(pen.getImageData(canvas.width * x, y, 1, 1).data);
                }""",
                [row, rows, x],
            )
        )


@pytest.fixture(params=[3, 1000])
def page(request: pytest.FixtureRequest, browser: Any, tmp_path: Path) -> Iterator[Page]:
    opened = Page(browser, tmp_path, to_html(made_report(request.param)))
    yield opened
    opened.tab.close()


def wait_until(page: Page, expression: str, argument: object = None) -> None:
    """Wait for it from out here: the page's policy lets nobody evaluate text inside."""
    deadline_s = time.monotonic() + 20
    while not page.tab.evaluate(expression, argument):
        assert time.monotonic() < deadline_s, expression
        time.sleep(0.05)


def nodes_shown(page: Page) -> str:
    return str(page.tab.inner_text("#count"))


def test_it_draws_every_node_without_a_complaint_or_a_request(page: Page) -> None:
    count = page.tab.evaluate("JSON.parse(document.getElementById('data').textContent).nodes.length")
    assert nodes_shown(page) == f"{count} of {count} nodes"
    assert (page.complaints, page.requests) == ([], [])
    drawn = {tuple(page.row_color(row, count, x)) for row in (0, count // 2, count - 2) for x in (0.12, 0.3)}
    stages = page.tab.eval_on_selector_all(
        "#legend .key", "keys => keys.map(key => getComputedStyle(key).backgroundColor)"
    )
    assert {f"rgb({red}, {green}, {blue})" for red, green, blue, _ in drawn} <= set(stages)


def test_pointing_at_a_row_shows_the_nodes_figures(page: Page) -> None:
    for _ in range(5):
        page.tab.click("#taller")
    box = page.tab.locator("#canvas").bounding_box()
    page.tab.mouse.move(box["x"] + 400, box["y"] + 30)
    told = page.tab.inner_text("#hover")
    slowest = page.tab.inner_text(".cards b >> nth=3")
    assert told.startswith(slowest)
    for part in ("checkpoint", "fetched", "clock", "trained"):
        assert part in told
    page.tab.mouse.move(box["x"] + 400, box["y"] - 60)
    assert not page.tab.locator("#hover").is_visible()


def test_no_kind_is_broken_where_other_nodes_gave_bytes(browser: Any, tmp_path: Path) -> None:
    """The widest table: a path takes whatever room it can get."""
    text = to_html(make_with_peers(0, 3 << 30))
    page = Page(browser, tmp_path, text)
    page.tab.set_viewport_size({"width": 1000, "height": 900})
    assert "from peers" in page.tab.inner_text("main")
    lines = page.tab.eval_on_selector_all(
        "td.what",
        """cells => cells.map(cell => {
            const range = document.createRange();
            range.selectNodeContents(cell);
            return range.getClientRects().length;
        })""",
    )
    assert lines == [1, 1]
    page.tab.close()


def test_order_search_and_zoom(browser: Any, tmp_path: Path) -> None:
    page = Page(browser, tmp_path, to_html(made_report(1000)))
    box = page.tab.locator("#canvas").bounding_box()

    def first() -> str:
        for _ in range(5):
            page.tab.click("#taller")
        page.tab.mouse.move(box["x"] + 400, box["y"] + 30)
        return str(page.tab.inner_text("#hover b"))

    page.tab.select_option("#sort", "name")
    assert first() == "gpu-0001"
    page.tab.select_option("#sort", label="longest checkpoint")
    assert first() == "gpu-0942"
    page.tab.fill("#find", "gpu-009")
    assert nodes_shown(page) == "10 of 1000 nodes"
    page.tab.fill("#find", "")
    page.tab.click("#all")
    wait_until(page, "document.getElementById('view').scrollHeight === 1026")
    page.tab.click("#taller")
    wait_until(page, "document.getElementById('view').scrollHeight === 2026")
    before = page.tab.evaluate("document.getElementById('canvas').toDataURL()")
    page.tab.mouse.move(box["x"] + 300, box["y"] + 200)
    page.tab.mouse.down()
    page.tab.mouse.move(box["x"] + 500, box["y"] + 200)
    page.tab.mouse.up()
    wait_until(page, "before => document.getElementById('canvas').toDataURL() !== before", before)
    page.tab.click("#all")
    wait_until(page, "document.getElementById('view').scrollHeight === 1026")
    assert page.complaints == []
    page.tab.close()


def test_it_is_dark_where_the_reader_wants_that(browser: Any, tmp_path: Path) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page = Page(browser, tmp_path, to_html(made_report(3)), scheme)
        grounds.append(page.tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.tab.close()
    assert grounds == ["rgb(246, 247, 249)", "rgb(16, 20, 26)"]


def test_hostile_texts_do_nothing(browser: Any, tmp_path: Path) -> None:
    attack = "</script><script>document.title='owned'</script><img src=//e.example/x onerror=alert(1)>"
    run = made_run(3)
    assert run.record is not None
    nodes = tuple(
        replace(sent, events=tuple(replace(event, target=attack, message=attack) for event in sent.events))
        for sent in run.nodes
    )
    record = replace(run.record, name=attack, account=attack, partition=attack)
    page = Page(
        browser, tmp_path, to_html(analyse(replace(run, record=record, nodes=nodes, notes=(attack,))))
    )
    assert attack in page.tab.inner_text("h1")
    assert page.tab.title().startswith("Start of job")
    assert (page.complaints, page.requests) == ([], [])
    assert page.tab.locator("img").count() == 0
    page.tab.close()


def test_what_the_policy_forbids_does_not_run(browser: Any, tmp_path: Path) -> None:
    """Were a text ever to become HTML, the policy is what is left."""
    text = to_html(made_report(3)).replace(
        "</main>", "<script>document.title='owned'</script><img src='//e.example/x'></main>"
    )
    page = Page(browser, tmp_path, text)
    assert page.tab.title() != "owned"
    assert page.requests == []
    assert sum("Content Security Policy" in complaint for complaint in page.complaints) >= 2
    page.tab.close()


def test_a_reader_without_scripts_has_the_tables(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(to_html(made_report(1000)))
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(file.as_uri())
    assert "slow link" in tab.inner_text("main")
    assert "checkpoint" in tab.inner_text("table >> nth=0")
    context.close()
