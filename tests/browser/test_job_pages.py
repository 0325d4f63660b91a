"""The pages about jobs in real Chromium, while a job goes on."""

import json
from collections.abc import Callable
from typing import Any

from playwright.sync_api import expect
from tests.browser.pages import HOSTILE, SCREENS, NewPage, is_whole
from tests.teacher_service.api.conftest import Api, api, capture
from tests.teacher_service.conftest import teacher_world

from logitlake_shared.web.tokens import TokenStore

__all__ = ["api", "capture", "teacher_world"]

# A job has to start a process and import what it needs.
PATIENCE_MS = 60_000

Capture = Callable[..., dict[str, Any]]


def hanging(capture: Capture, cache: str = "main") -> dict[str, Any]:
    """A job that works on its second unit until it is told otherwise."""
    return capture(cache, engine={"type": "fake", "hang_on": ["s007"]}, executor={"type": "inline", "grace_s": 0.1})


@SCREENS
def test_a_job_is_followed_without_reloading_and_ended_by_a_button(
    api: Api, new_page: NewPage, capture: Capture, width: int, scheme: str
) -> None:
    """The page comes to say what happens; a reload in between changes nothing; axe finds nothing at any time."""
    client = api()
    job = client.post("/v1/jobs", json=hanging(capture) | {"name": "nightly", "labels": {"team": "vision"}}).json()[
        "id"
    ]
    page = new_page(width, color_scheme=scheme)
    page.goto(f"{client.base_url}/jobs")
    expect(page.locator(".state")).to_have_text("running", timeout=PATIENCE_MS)
    is_whole(page)
    page.get_by_role("link", name="nightly").click()
    expect(page.locator("#live .state")).to_have_text("running", timeout=PATIENCE_MS)
    expect(page.locator(".progress .done")).not_to_have_attribute("width", "0", timeout=PATIENCE_MS)
    is_whole(page)
    page.reload()
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("#live .state")).to_have_text("paused", timeout=PATIENCE_MS)
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("#live .state")).to_have_text("running", timeout=PATIENCE_MS)
    page.get_by_role("button", name="Cancel").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#live .state")).to_have_text("cancelled", timeout=PATIENCE_MS)
    expect(page.locator("#live")).not_to_have_attribute("hx-get", "/.*/")
    expect(page.get_by_role("button")).to_have_count(0)
    is_whole(page)
    assert client.get(f"/v1/jobs/{job}").json()["state"] == "cancelled"


def test_a_job_that_ended_shows_what_it_came_to(api: Api, new_page: NewPage, capture: Capture) -> None:
    """A success with its result and a link to its cache; a failure with its words, and no path of the machine."""
    client = api()
    good = client.post("/v1/jobs", json=capture("good")).json()["id"]
    broken = capture("broken")
    broken["config"]["data"][0]["path"] += ".absent"
    bad = client.post("/v1/jobs", json=broken).json()["id"]
    page = new_page()
    page.goto(f"{client.base_url}/jobs/{good}")
    expect(page.locator("#live .state")).to_have_text("succeeded", timeout=PATIENCE_MS)
    expect(page.get_by_role("heading", name="Result")).to_be_visible()
    is_whole(page)
    page.get_by_role("link", name="good", exact=True).click()
    expect(page.get_by_role("heading", name="Tasks")).to_be_visible()
    page.goto(f"{client.base_url}/jobs/{bad}")
    expect(page.get_by_role("alert")).to_contain_text("DataError", timeout=PATIENCE_MS)
    assert "/tmp" not in page.get_by_role("alert").inner_text()
    is_whole(page)


def test_hostile_names_and_labels_stay_text(api: Api, new_page: NewPage, capture: Capture) -> None:
    """In the list, in the job, in the filter."""
    client = api(max_running=1)
    first = None
    for text in HOSTILE:
        labels = {text[:40]: text[:200]}
        sent = capture("main") | {"name": text[:100], "labels": labels, "max_attempts": 1}
        answer = client.post("/v1/jobs", content=json.dumps(sent), headers={"Content-Type": "application/json"})
        assert answer.status_code == 201, answer.text
        first = first or answer.json()["id"]
    page = new_page(320)
    for path in ("/jobs", f"/jobs/{first}", f"/jobs?label={HOSTILE[0]}:x", f"/jobs?state={HOSTILE[0]}"):
        page.goto(f"{client.base_url}{path}")
        is_whole(page)


def test_who_may_only_look_has_no_buttons_and_no_log(
    api: Api, new_page: NewPage, capture: Capture, tmp_path: Any
) -> None:
    """A token that covers another cache sees no job at all."""
    tokens = TokenStore(tmp_path / "tokens.sqlite")
    admin, reader, other = (
        tokens.create(name, scope, (cache,))[0]
        for name, scope, cache in (("a", "submit", "*"), ("b", "read", "main"), ("c", "read", "other"))
    )
    client = api(service={"tokens": tmp_path / "tokens.sqlite"})
    header = {"Authorization": f"Bearer {admin}"}
    job = client.post("/v1/jobs", json=hanging(capture), headers=header).json()["id"]
    for token, sees in ((reader, True), (other, False)):
        page = new_page(extra_http_headers={"Authorization": f"Bearer {token}"})
        page.goto(f"{client.base_url}/jobs")
        expect(page.get_by_role("link", name=job)).to_have_count(int(sees))
        page.goto(f"{client.base_url}/jobs/{job}")
        expect(page.get_by_role("heading", name=job)).to_have_count(int(sees))
        expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
        expect(page.get_by_role("region", name="Log")).to_have_count(0)
    client.post(f"/v1/jobs/{job}/cancel", json={"mode": "now"}, headers=header)
