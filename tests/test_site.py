"""The built documentation in a real browser: what people search for, and that nothing is fetched.

Needs mkdocs, Playwright and a Chromium of the system; where one is missing that is said, and the
tests are skipped.
"""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

if not (ROOT / "mkdocs.yml").is_file():
    pytest.skip("only a checkout has the pages", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytest.importorskip("mkdocs", reason="needs the dependency group docs")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
if BROWSER is None:
    pytest.skip("needs a Chromium: apt-get install chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The pages, built strictly and served on loopback."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    subprocess.run([*command, f"--site-dir={folder}"], cwd=ROOT, check=True, timeout=120)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    yield page
    page.close()


def found_for(page: Any, site: str, text: str) -> list[str]:
    """The addresses that the site's own search shows for a text, best first."""
    page.locator("input[data-md-component=search-query]").focus()
    page.keyboard.type(text)
    links = page.locator("a.md-search-result__link")
    links.first.wait_for(timeout=30_000)
    return [str(link.get_attribute("href")).removeprefix(site) for link in links.all()]


@pytest.mark.parametrize(
    "text",
    [
        "Trainer job not found or not running",
        "Error retrieving result",
        "NotFoundError: Error code: 404",
        "may have been carried out",
    ],
)
def test_the_search_for_an_error_text_finds_troubleshooting_first(
    page: Any, site: str, text: str
) -> None:
    page.goto(site)
    first, *_ = found_for(page, site, text)
    assert first.startswith("troubleshooting/")


@pytest.mark.parametrize("path", ["", "how-it-works/", "quick-start/", "troubleshooting/"])
def test_nothing_is_fetched_from_elsewhere(page: Any, site: str, path: str) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{site}{path}")
    found_for(page, site, "stale")
    assert f"{site}{path}" in asked
    assert [url for url in asked if not url.startswith((site, "data:", "blob:"))] == []


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize(
    "path", ["", "troubleshooting/", "settings/", "how-it-works/", "command-line/"]
)
def test_no_page_is_wider_than_the_screen(page: Any, site: str, width: int, path: str) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(f"{site}{path}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_diagram_of_the_architecture_is_shown_whole_on_a_desktop(page: Any, site: str) -> None:
    page.goto(f"{site}architecture/")
    diagram = page.locator("pre code").filter(has_text="training program")
    assert diagram.evaluate("code => code.scrollWidth <= code.clientWidth")
