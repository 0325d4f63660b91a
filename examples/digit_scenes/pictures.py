"""Pictures of the services' pages over what `make demo` left, for the documentation.

    logitlake-student score runs/demo/student runs/demo/lake --cache main --split test
    python -m examples.digit_scenes.pictures --out docs/pictures       (needs Debian's chromium and the extra `dev`)

Both services run as anybody would run them, with the configurations that ship, on ports of their own.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
import httpx
from playwright.sync_api import sync_playwright

TEACHER, STUDENT = ("logitlake-teacher", 8421), ("logitlake-student", 8422)
CONFIGS = {
    TEACHER: "teacher_service/logitlake_teacher/configs/serve.toml",
    STUDENT: "student_trainer/logitlake_student/configs/serve.toml",
}
SAMPLE = "/caches/main/samples/test-00096-0-caption?student=student%2Fpreference"
PAGES = {
    "sample": (TEACHER, SAMPLE),
    "run": (STUDENT, "/runs/student"),
}
WIDTH, MOST_HEIGHT = 1000, 1150
START_S = 60


@contextmanager
def serving(service: tuple[str, int]) -> Iterator[None]:
    """While the service answers."""
    program, port = service
    command = [str(Path(sys.executable).parent / program), "serve", CONFIGS[service], f"service.port={port}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        transport = httpx.HTTPTransport(retries=10)  # with growing pauses, while nobody listens yet
        with httpx.Client(transport=transport, timeout=START_S) as client:
            client.get(f"http://127.0.0.1:{port}/readyz").raise_for_status()
        yield
    finally:
        process.terminate()
        process.wait()


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(out: Path) -> None:
    """Take them."""
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for service in CONFIGS:
            stack.enter_context(serving(service))
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 200})
        for name, ((_, port), path) in PAGES.items():
            page.goto(f"http://127.0.0.1:{port}{path}")
            height = min(MOST_HEIGHT, page.evaluate("document.documentElement.scrollHeight"))
            clip = {"x": 0, "y": 0, "width": WIDTH, "height": height}
            page.screenshot(path=out / f"{name}.png", full_page=True, clip=clip)
            click.echo(out / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
