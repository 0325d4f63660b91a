"""The teacher's pages in real Chromium: they work, for everybody, whatever the lake holds."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from playwright.sync_api import expect
from tests.browser.pages import HOSTILE, SCREENS, NewPage, is_whole
from tests.served import served
from tests.shared.conftest import made_scores, small_lake

from logitlake_schemas import CaptureSpec, UnitError
from logitlake_shared.lake import Lake
from logitlake_shared.reader import PairDataset
from logitlake_shared.student_scores import scores_path
from logitlake_shared.web.sessions import COOKIE
from logitlake_shared.web.tokens import TokenStore
from logitlake_teacher.api.app import teacher_app
from logitlake_teacher.config.serve import ServeConfig

__all__ = ["small_lake"]

PATHS = {
    "overview": "/",
    "cache": "/caches/main",
    "part": "/caches/main?task=nothing",
    "pairs": "/caches/pairs",
    "sample": "/caches/main/samples/sample-0010",
    "sql": "/sql",
    "answer": "/sql?sql=SELECT+*+FROM+tokens",
    "wrong": "/sql?sql=DROP+TABLE+tokens",
    "missing": "/caches/nope",
    "student": "/caches/main/samples/sample-0010?student=demo%2Fd2s",
    "health": "/health",
}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """`serve(lake, tokens=path)`: its address."""
    with ExitStack() as stack:

        def start(lake: Path, **service: Any) -> str:
            sections = {"service": service, "sql": {"timeout_s": 60}, "runs": tmp_path / "runs"}
            config = ServeConfig.model_validate({"lake": str(lake)} | sections)
            return stack.enter_context(served(teacher_app(config)))

        yield start


@SCREENS
def test_every_page_is_whole_and_accessible(
    new_page: NewPage, serve: Callable[..., str], small_lake: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    """WCAG's rules as axe knows them: contrast, names, landmarks; from a telephone to a desk, by day and night."""
    made_scores(small_lake, scores_path(tmp_path / "runs/demo/d2s", "main", None))
    url = serve(small_lake)
    pair = PairDataset(small_lake, "pairs").ids()[0]
    page = new_page(width, color_scheme=scheme)
    for name, path in (PATHS | {"pair": f"/caches/pairs/samples/{pair}"}).items():
        answer = page.goto(f"{url}{path}")
        assert answer is not None
        assert answer.status == (404 if name == "missing" else 200), name
        is_whole(page)


def test_a_visitor_finds_a_token(new_page: NewPage, serve: Callable[..., str], small_lake: Path) -> None:
    page = new_page()
    page.goto(serve(small_lake))
    page.get_by_role("link", name="main").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("main")
    page.get_by_role("link", name="sample-0010").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("sample-0010")
    expect(page.get_by_role("img")).to_have_js_property("complete", True)
    expect(page.get_by_role("img")).not_to_have_js_property("naturalWidth", 0)
    page.locator(".said a").nth(2).click()
    assert page.url.endswith("#t1-2")
    expect(page.locator("tr:target")).to_be_visible()


def test_a_visitor_puts_a_student_beside_the_teacher(
    new_page: NewPage, serve: Callable[..., str], small_lake: Path, tmp_path: Path
) -> None:
    """By a link; then the response is coloured twice, and each token has what both would have said."""
    made_scores(small_lake, scores_path(tmp_path / "runs/demo/d2s", "main", None))
    page = new_page()
    page.goto(f"{serve(small_lake)}/caches/main/samples/sample-0010")
    students = page.get_by_role("navigation", name="Student")
    expect(page.locator(".said")).to_have_count(1)
    students.get_by_role("link", name="demo/d2s").click()
    expect(students.locator("[aria-current]")).to_have_text("demo/d2s")
    expect(page.locator(".said")).to_have_count(2)
    expect(page.get_by_role("columnheader", name="the student's")).to_be_visible()
    expect(page.locator("td.wide code")).not_to_have_count(0)
    students.get_by_role("link", name="nobody").click()
    expect(page.locator(".said")).to_have_count(1)


def test_the_page_of_health_says_what_is_wrong(new_page: NewPage, serve: Callable[..., str], small_lake: Path) -> None:
    """Checks and figures; a lake that goes away is seen without reloading the page."""
    page = new_page()
    page.goto(f"{serve(small_lake)}/health")
    expect(page.locator(".checks")).to_contain_text("ok lake")
    page.reload()
    page.get_by_role("row", name="logitlake_http_requests").locator("summary").click()
    expect(page.get_by_text("method GET, route /health, status 200: 1")).to_be_visible()
    manifest = small_lake / "lake.json"
    manifest.rename(small_lake / "gone.json")
    expect(page.locator(".checks .failed")).to_have_text("wrong", timeout=20_000)
    expect(page.locator(".checks")).not_to_contain_text(str(small_lake))
    is_whole(page)


def test_the_keyboard_alone_asks_a_question(new_page: NewPage, serve: Callable[..., str], small_lake: Path) -> None:
    """Tab from the top: skip link, brand, pages, the text, the button."""
    page = new_page()
    page.goto(f"{serve(small_lake)}/sql")
    for _ in range(6):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "sql"
    page.keyboard.type("SELECT 41 + 1 AS answer")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("1 row in")
    expect(page.get_by_role("cell")).to_have_text("42")
    with page.expect_download() as download:
        page.get_by_role("link", name="csv").press("Enter")
    assert download.value.suggested_filename == "answer.csv"
    assert download.value.path().read_text().splitlines() == ["answer", "42"]
    page.go_back()
    page.get_by_role("link", name="What could not be captured?").click()
    expect(page.get_by_role("status")).to_contain_text("0 rows in")


def test_what_a_lake_holds_stays_text(
    new_page: NewPage, serve: Callable[..., str], small_lake: Path, make_unit: Callable[..., Any]
) -> None:
    """Ids, tasks, conversations, codes and questions as whoever wrote them liked; every id leads to its sample."""
    unit = make_unit(7, num_samples=len(HOSTILE))
    samples = [
        replace(
            sample, sample_id=f"h{place:02d} {text}", task=text, split=text, messages=[{"role": text, "content": text}]
        )
        for place, (sample, text) in enumerate(zip(unit.samples, HOSTILE, strict=True))
    ]
    errors = [UnitError(sample_id=text, code=f"c{place}", message=text) for place, text in enumerate(HOSTILE)]
    cache = Lake.open(small_lake).cache("main")
    cache.publish_unit(replace(unit, samples=samples, errors=errors))
    cache.snapshot()
    url = serve(small_lake)
    page = new_page(320)
    page.goto(f"{url}/caches/main")
    is_whole(page)
    links = page.locator("a[href*='/samples/h']")
    addresses = [links.nth(place).get_attribute("href") for place in range(links.count())]
    assert len(addresses) == len(HOSTILE)
    for sample, address in zip(samples, addresses, strict=True):
        answer = page.goto(f"{url}{address}")
        assert answer is not None
        assert answer.status == 200
        assert page.locator("h1").text_content() == sample.sample_id
        assert sample.task in (page.locator(".card").first.text_content() or "")
    is_whole(page)
    page.goto(f"{url}/sql")
    page.locator("#sql").fill("-- " + " ".join(HOSTILE[:8]))
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.locator("#sql")).to_have_value(re.compile("textarea><script>alert"))


def test_figures_that_are_none_or_odd_are_shown(
    new_page: NewPage,
    serve: Callable[..., str],
    small_lake: Path,
    make_unit: Callable[..., Any],
    capture_spec: CaptureSpec,
) -> None:
    """A cache without a snapshot, a logprob that is not a number, a thousand columns."""
    lake = Lake.open(small_lake)
    lake.create_cache("empty", capture_spec)
    unit = make_unit(8)
    rows = unit.samples[0].rows
    odd = replace(rows, label_logprob_T=np.array([np.nan, -np.inf, -1e30, 0], np.float32))
    cache = lake.cache("main")
    cache.publish_unit(replace(unit, samples=[replace(unit.samples[0], sample_id="odd", rows=odd)]))
    cache.snapshot()
    url = serve(small_lake)
    page = new_page(320)
    columns = ", ".join(f"{number} AS c{number}" for number in range(1000))
    for path in (
        "/",
        "/caches/empty",
        "/caches/main/samples/odd",
        f"/sql?sql=SELECT {columns}",
        "/sql?sql=SELECT 'NaN'::DOUBLE",
    ):
        answer = page.goto(f"{url}{path}")
        assert answer is not None
        assert answer.status == 200
        is_whole(page)


def test_an_empty_lake_says_what_to_do(new_page: NewPage, serve: Callable[..., str], tmp_path: Path) -> None:
    Lake.create(tmp_path / "none")
    page = new_page()
    page.goto(serve(tmp_path / "none"))
    expect(page.get_by_text("logitlake-teacher capture")).to_be_visible()
    is_whole(page)


def test_a_browser_logs_in_with_a_token(
    new_page: NewPage, serve: Callable[..., str], small_lake: Path, tmp_path: Path
) -> None:
    """To the page it asked for; the cookie is out of reach of scripts and of other sites; out again."""
    tokens = TokenStore(tmp_path / "tokens.sqlite")
    text, made = tokens.create("ada", "read", ("main",))
    url = serve(small_lake, tokens=tmp_path / "tokens.sqlite")
    page = new_page()
    page.goto(f"{url}/caches/main")
    expect(page).to_have_url(re.compile("/login"))
    is_whole(page)
    page.get_by_label("Token").fill("llk_wrong")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_have_text("No valid token.")
    page.get_by_label("Token").fill(text)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("main")
    (cookie,) = page.context.cookies()
    assert (cookie["name"], cookie["httpOnly"], cookie["sameSite"]) == (COOKIE, True, "Strict")
    assert text not in page.content()
    page.goto(f"{url}/caches/pairs")
    expect(page.get_by_role("heading", level=1)).to_have_text("Nothing of that name")
    page.get_by_role("button", name="Log out ada").click()
    expect(page).to_have_url(re.compile("/login"))
    assert page.context.cookies() == []

    cookies = {COOKIE: text}
    body = {"sql": "SELECT 1"}
    for headers in ({}, {"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
        assert httpx.post(f"{url}/v1/sql", json=body, cookies=cookies, headers=headers).status_code == 403
    own = {"sec-fetch-site": "same-origin"}
    assert httpx.post(f"{url}/v1/sql", json=body, cookies=cookies, headers=own, timeout=60).status_code == 200
    tokens.revoke(made.id)
    assert httpx.get(f"{url}/v1/caches", cookies=cookies).status_code == 401


@pytest.mark.parametrize("then", ["https://evil.example", "//evil.example", "/\\evil.example", "javascript:alert(1)"])
def test_logging_in_leads_nowhere_else(serve: Callable[..., str], small_lake: Path, tmp_path: Path, then: str) -> None:
    text, _ = TokenStore(tmp_path / "tokens.sqlite").create("ada", "read")
    url = serve(small_lake, tokens=tmp_path / "tokens.sqlite")
    form = {"token": text, "then": then}
    answer = httpx.post(f"{url}/login", data=form, headers={"sec-fetch-site": "same-origin"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert httpx.post(f"{url}/login", data=form, headers={"origin": "https://evil.example"}).status_code == 401
