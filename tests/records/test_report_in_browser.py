"""The report in headless chromium, which is spoken to over the pipe of its DevTools protocol.

Skipped where there is none; Debian's package is called chromium.
"""

import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import time

import pytest

from records.studies import result, write_run
from vkd.records.grouping import build_table
from vkd.records.reading import read_runs
from vkd.records.report import to_html

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

SECONDS = 60
_FLAGS = [
    "--headless",
    "--no-sandbox",  # which root cannot have
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-pipe",
]


class Browser:
    """A chromium that reads commands from its descriptor 3 and answers on 4, each message ended by a zero byte.

    Args:
        profile: a folder of its own.
    """

    def __init__(self, profile):
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # Above those that the child gets, so that none is overwritten before it is copied.
        high_in, high_out = (fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (theirs_in, theirs_out))
        nothing = os.open(os.devnull, os.O_RDWR)
        self.process = os.posix_spawn(
            CHROMIUM,
            [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            os.environ,
            file_actions=[
                *((os.POSIX_SPAWN_DUP2, nothing, descriptor) for descriptor in (0, 1, 2)),
                (os.POSIX_SPAWN_DUP2, high_in, 3),
                (os.POSIX_SPAWN_DUP2, high_out, 4),
            ],
            setpgroup=0,
        )
        for end in (theirs_in, theirs_out, high_in, high_out, nothing):
            os.close(end)
        self.out, self.into = ours_out, ours_in
        self.unread = b""
        self.events = []
        self.numbers = itertools.count(1)

    def send(self, method, session=None, **parameters):
        """The answer to a command; events that come before it are kept."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self.out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + SECONDS
        while True:
            answer = self._receive(until)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _receive(self, until):
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.into], [], [], max(0.0, until - time.monotonic()))
            assert ready, "chromium does not answer"
            data = os.read(self.into, 2**16)
            assert data, "chromium has ended"
            self.unread += data
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def close(self):
        """End the browser and its children."""
        os.close(self.out)
        os.close(self.into)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)


class Page:
    """A tab with a file in it.

    Args:
        dark: what the system prefers; scripts: whether they may run.
    """

    def __init__(self, browser, path, *, width=1280, height=900, dark=False, scripts=True):
        self.browser = browser
        target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.resize(width, height)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        if not scripts:
            self.send("Emulation.setScriptExecutionDisabled", value=True)
        self.send("Page.navigate", url=path.as_uri())
        until = time.monotonic() + SECONDS
        while not self.happened("Page.loadEventFired"):
            assert time.monotonic() < until
            self.send("Runtime.evaluate", expression="0")

    def send(self, method, **parameters):
        return self.browser.send(method, self.session, **parameters)

    def resize(self, width, height):
        is_phone = width < 600
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=is_phone
        )

    def evaluate(self, expression):
        """The value of an expression of JavaScript, a promise's when it is kept."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def happened(self, *methods):
        """The parameters of the events of this page so far."""
        return [
            event["params"]
            for event in self.browser.events
            if event.get("sessionId") == self.session and event["method"] in methods
        ]

    def complaints(self):
        """What the page's console shows as errors, and what no script has caught."""
        said = [event["entry"] for event in self.happened("Log.entryAdded")]
        said += self.happened("Runtime.exceptionThrown")
        return said + [event for event in self.happened("Runtime.consoleAPICalled") if event["type"] != "log"]

    def centre(self, selector, index=0):
        """Where the middle of an element is, once that is in view and what the scrolling hides is hidden."""
        place = f"document.querySelectorAll({json.dumps(selector)})[{index}]"
        self.evaluate(f"{place}.scrollIntoView({{block: 'center', inline: 'nearest', behavior: 'instant'}})")
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return self.evaluate(
            f"(() => {{ const box = {place}.getBoundingClientRect();"
            " return [box.left + box.width / 2, box.top + box.height / 2]; })()"
        )

    def point_at(self, x, y):
        """Move the mouse to a place of the window."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def hover(self, selector, index=0):
        """Move the mouse to the middle of an element until the tooltip is there: late news of scrolling may hide it."""
        until = time.monotonic() + SECONDS
        while True:
            self.point_at(*self.centre(selector, index))
            if self.tooltip() is not None:
                return
            assert time.monotonic() < until, f"no tooltip at {selector} {index}"
            self.point_at(0, 0)

    def click(self, selector, index=0):
        """Press the mouse on an element."""
        x, y = self.centre(selector, index)
        self.point_at(x, y)
        for step in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=step, x=x, y=y, button="left", clickCount=1)

    def press(self, key):
        """Press a key, with the text that it types."""
        code = {"Enter": 13, "Tab": 9, "ArrowRight": 39, "ArrowUp": 38, "Escape": 27}[key]
        more = {"text": "\r"} if key == "Enter" else {}
        for step in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=step, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def tooltip(self):
        """The text of the tooltip; None while it is hidden."""
        return self.evaluate("tooltip.hidden ? null : tooltip.textContent")

    def texts(self, selector):
        """The texts of elements, in their order."""
        return self.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => one.textContent)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The page of a study with a grid, a hole, curves and more than twenty runs."""
    root = tmp_path_factory.mktemp("study")
    for seed in (1, 2, 3):
        for point in [None, *((alpha, beta) for alpha in (0.4, 0.7, 1.0) for beta in (0.0, 0.3))]:
            top = 60.0 if point is None else 66 - 8 * (point[0] - 0.7) ** 2 - 9 * (point[1] - 0.3) ** 2 + seed / 9
            names = ("none", None) if point is None else ("kd", "abkd")
            command = f"python -m vkd.train method={names[0]} seed={seed} 'note=a b'"
            content = result(*names, point=point, seed=seed, top1=top, val=top + 1, environment={"command": command})
            is_hole = point == (1.0, 0.0)
            folder = write_run(root / "runs", content, {"state": "failed", "reason": "no memory"} if is_hole else None)
            lines = [
                {"epoch": epoch, "val/top1": top - 20 / epoch + seed / 5, "train/loss": 5 / epoch + seed / 50}
                for epoch in range(1, 9)
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return write(root, {"accuracy": b'<svg xmlns="http://www.w3.org/2000/svg" width="90" height="90"/>'})


def write(root, figures):
    """Write the page of the study below `root`; its path."""
    runs = read_runs(root / "runs" / "quickstart", relative_to=root / "runs")
    table = build_table(runs, study="quickstart", metric="test/top1", command="python -m vkd.collect study=quickstart")
    folder = root / "results" / "quickstart"
    folder.mkdir(parents=True)
    html = to_html(table, runs_root=root / "runs", folder=folder, figures=figures)
    (folder / "report.html").write_text(html, encoding="utf-8")
    return folder / "report.html"


@pytest.fixture(scope="module")
def opened(browser, path):
    """The page in a wide window; tests leave it as they found it."""
    return Page(browser, path)


def test_the_page_asks_for_nothing_and_has_nothing_to_complain_of(opened, path):
    asked = {event["request"]["url"].split(",")[0] for event in opened.happened("Network.requestWillBeSent")}
    assert asked <= {path.as_uri(), "data:image/svg+xml;base64"}
    assert path.as_uri() in asked
    assert opened.evaluate("document.images[0].naturalWidth") == 90
    assert opened.complaints() == []


def first_figures(page):
    """The numbers in the column of the metric, from top to bottom; None for a hole."""
    texts = page.texts("tbody.rows td:nth-child(5)")
    return [None if text.startswith("hole") else float(text.split(" ")[0]) for text in texts]


def test_a_press_on_a_header_sorts_by_numbers_and_keeps_holes_last(opened):
    original = first_figures(opened)
    numbers = sorted(value for value in original if value is not None)
    assert original != [*numbers, None]
    assert original.index(None) < len(original) - 1
    states = []
    for _ in range(3):
        opened.click("th[data-index='4'] button")
        states.append(
            (opened.evaluate("document.querySelector('th[data-index=\"4\"]').ariaSort"), first_figures(opened))
        )
    assert states == [
        ("ascending", [*numbers, None]),
        ("descending", [*numbers[::-1], None]),
        ("none", original),
    ]
    assert opened.texts("tbody.teacher td")[0] == "teacher (test)"


def test_the_keyboard_sorts_too_and_one_column_at_a_time(opened):
    opened.evaluate("document.querySelector('th[data-index=\"4\"] button').focus()")
    opened.press("Enter")
    assert first_figures(opened)[0] == 60.0
    opened.evaluate("document.querySelector('th[data-index=\"3\"] button').focus()")
    opened.press("Enter")
    assert opened.texts("tbody.rows td:nth-child(4)") == ["0", "0", "0", "0.3", "0.3", "0.3", "-"]
    sorts = opened.evaluate("[...document.querySelectorAll('th[data-index]')].map((one) => one.ariaSort)")
    assert sorts == ["none"] * 3 + ["ascending"] + ["none"] * 3
    opened.press("Enter")
    opened.press("Enter")


def test_texts_sort_as_texts(opened):
    opened.click("th[data-index='1'] button")
    assert opened.texts("tbody.rows td:nth-child(2)") == ["abkd"] * 6 + ["-"]
    opened.click("th[data-index='1'] button")
    opened.click("th[data-index='1'] button")


def test_hovering_a_point_of_the_map_says_which_runs_it_is(opened):
    marks = opened.evaluate("[...document.querySelectorAll('.point')].map((one) => one.getAttribute('aria-label'))")
    assert len(marks) == 12
    for index in (1, 7):
        opened.hover(".point", index)
        assert opened.tooltip() == marks[index]
    place = next(index for index, mark in enumerate(marks) if mark.startswith("alpha 0.4, beta 0.3:"))
    opened.hover(".point", place)
    lines = opened.tooltip().split("\n")
    values = [66 - 8 * 0.3**2 + seed / 9 for seed in (1, 2, 3)]
    assert lines[2].startswith(f"test top-1 (%): {sum(values) / 3:.2f} ± 0.11, n = 3")
    assert lines[3] == "seeds 1, 2, 3"
    assert [line.split("/")[-1][:9] for line in lines[4:]] == ["kd-abkd-s"] * 3
    hole = next(index for index, mark in enumerate(marks) if mark.startswith("alpha 1, beta 0:"))
    opened.hover(".point", hole)
    assert opened.tooltip().count("failed: no memory") == 3
    assert opened.evaluate("document.querySelectorAll('title').length") == 1  # no second tooltip of the browser's
    opened.point_at(5, 5)
    assert opened.tooltip() is None


def test_the_tooltip_stays_inside_the_window(opened):
    for index in range(12):
        opened.hover(".point", index)
        left, top, right, bottom = opened.evaluate(
            "(() => { const box = tooltip.getBoundingClientRect();"
            " return [box.left, box.top, box.right, box.bottom]; })()"
        )
        assert left >= 0
        assert top >= 0
        assert right <= 1280
        assert bottom <= 900
    opened.point_at(5, 5)


def test_arrow_keys_go_from_point_to_point_and_escape_hides(opened):
    opened.centre(".point")
    opened.evaluate("document.querySelector('.point[tabindex=\"0\"]').focus({preventScroll: true})")
    assert opened.tooltip().startswith("alpha 0.4, beta 0:")
    for key, where in (("ArrowRight", "alpha 0.7, beta 0:"), ("ArrowUp", "alpha 0.7, beta 0.3:")):
        opened.press(key)
        assert opened.tooltip().startswith(where)
    assert opened.evaluate("document.querySelectorAll('.roving')[0].querySelectorAll('[tabindex=\"0\"]').length") == 1
    opened.evaluate("scrollBy({top: 40, behavior: 'instant'})")
    opened.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert opened.tooltip().startswith("alpha 0.7, beta 0.3:")  # a key that scrolls does not hide what it shows
    opened.press("Escape")
    assert opened.tooltip() is None
    opened.evaluate("document.activeElement.blur()")


def test_a_line_of_the_parallel_coordinates_says_its_run(opened):
    lines = opened.evaluate("[...document.querySelectorAll('.run-line')].map((one) => one.dataset.tells)")
    assert len(lines) == 15
    opened.centre(".run-line", 14)
    x, y = opened.evaluate(
        "(() => { const path = document.querySelectorAll('.run-line .hit')[14];"
        " const spot = path.getPointAtLength(path.getTotalLength() * .97).matrixTransform(path.getScreenCTM());"
        " return [spot.x, spot.y]; })()"
    )
    opened.point_at(x, y)
    assert opened.tooltip() == lines[14]
    assert lines[14].startswith("alpha 0.7, beta 0.3, seed 3\n")
    assert lines[14].split("\n")[-1].startswith("quickstart/cifar_resnet20-cifar_resnet8_width4/kd-abkd-s3-")
    opened.point_at(5, 5)


def test_curves_are_drawn_to_scale_and_again_for_another_metric(opened):
    def lines():
        return opened.evaluate(
            "[...document.querySelectorAll('#curves-picture polyline')].map((one) =>"
            " one.getAttribute('points').split(' ').map((pair) => pair.split(',').map(Number)))"
        )

    data = opened.evaluate("JSON.parse(document.getElementById('curves-data').textContent)[0].metrics")
    assert [metric["title"] for metric in data] == ["val top-1 (%)", "train loss (nats, weighted sum of all terms)"]
    for choice, metric in ((0, data[0]), (1, data[1])):
        opened.evaluate(
            f"(() => {{ const select = document.getElementById('curves-metric'); select.value = {choice};"
            " select.dispatchEvent(new Event('change')); })()"
        )
        assert metric["title"] in opened.texts("#curves-picture text")
        assert "epoch" in opened.texts("#curves-picture text")
        drawn = lines()
        assert len(drawn) == len(metric["series"]) == 6
        pairs = [
            (height, mean)
            for line, series in zip(drawn, metric["series"], strict=True)
            for (_, height), mean in zip(line, series["mean"], strict=True)
        ]
        (low_y, low), (high_y, high) = max(pairs), min(pairs)
        assert high > low
        for height, mean in pairs:
            assert height == pytest.approx(low_y + (mean - low) / (high - low) * (high_y - low_y), abs=0.2)
    opened.evaluate(
        "(() => { const select = document.getElementById('curves-epochs'); select.value = '0.5';"
        " select.dispatchEvent(new Event('change')); })()"
    )
    assert {len(line) for line in lines()} == {5}
    assert opened.texts("#curves-legend li")[0] == "plain student"
    opened.evaluate(
        "for (const select of document.querySelectorAll('.controls select'))"
        " { select.selectedIndex = 0; select.dispatchEvent(new Event('change')); }"
    )


def test_hovering_a_curve_says_row_epoch_mean_and_number_of_runs(opened):
    opened.centre("#curves-picture")
    x, y = opened.evaluate(
        "(() => { const box = document.querySelectorAll('#curves-picture .dot')[3].getBoundingClientRect();"
        " return [box.left + box.width / 2, box.top + box.height / 2]; })()"
    )
    opened.point_at(x, y)
    assert opened.tooltip() == "plain student\nepoch 4: 55.40 ± 0.20, n = 3"
    opened.point_at(5, 5)
    assert opened.tooltip() is None


def test_runs_are_found_by_words_and_their_commands_copied(opened, browser):
    assert opened.evaluate("document.querySelector('details.many').open") is False
    opened.click("details.many summary")
    assert opened.texts("#filter-count") == ["21 of 21"]
    opened.evaluate("document.getElementById('filter').focus()")
    opened.send("Input.insertText", text="abkd FAILED -s2-")
    shown = "[...document.querySelectorAll('.runs li')].filter((one) => !one.hidden).map((one) => one.textContent)"
    (left,) = opened.evaluate(shown)
    assert "kd-abkd-s2-" in left
    assert opened.texts("#filter-count") == ["1 of 21"]
    opened.evaluate("(() => { filter.value = 'none -s1-'; filter.dispatchEvent(new Event('input')); })()")
    browser.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    index = opened.evaluate(
        "[...document.querySelectorAll('.command')].findIndex((one) => one.closest('li')?.checkVisibility())"
    )
    opened.click(".command button", index)
    until = time.monotonic() + 10
    while opened.texts(".command button")[index] == "Copy":
        assert time.monotonic() < until
    assert opened.texts(".command button")[index] == "Copied"
    assert opened.evaluate("navigator.clipboard.readText()") == "python -m vkd.train method=none seed=1 'note=a b'"
    opened.evaluate("(() => { filter.value = ''; filter.dispatchEvent(new Event('input')); })()")
    opened.click("details.many summary")


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_dark_is_what_the_system_has_or_the_button_says_and_paper_is_white(opened, browser, path):
    light = background(opened)
    assert light == "rgb(255, 255, 255)"
    opened.click("#theme")
    dark = background(opened)
    assert dark != light
    assert opened.texts("#theme") == ["Light"]
    opened.send("Emulation.setEmulatedMedia", media="print")
    assert background(opened) == light
    controls = (
        "[...document.querySelectorAll('button, select, input, nav, summary')].filter((one) => !one.closest('th'))"
    )
    assert opened.evaluate(f"{controls}.length") > 20
    assert opened.evaluate(f"{controls}.filter((one) => one.checkVisibility()).length") == 0
    assert opened.evaluate("document.querySelector('.only-print').checkVisibility()")
    opened.send("Emulation.setEmulatedMedia", media="")
    opened.click("#theme")
    assert background(opened) == light
    opened.evaluate("localStorage.clear()")
    page = Page(browser, path, dark=True)
    assert background(page) == dark
    page.click("#theme")
    assert background(page) == light
    page.evaluate("localStorage.clear()")


def test_nothing_scrolls_sideways_on_a_phone_and_a_tap_shows_the_run(browser, path):
    page = Page(browser, path, width=360, height=800)
    page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
    assert page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [360, 360]
    assert page.evaluate("innerWidth") == 360
    x, y = page.centre(".point", 2)
    touch = [{"x": x, "y": y}]
    page.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=touch)
    page.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    until = time.monotonic() + 10
    while page.tooltip() is None:
        assert time.monotonic() < until
    assert page.tooltip() == page.evaluate("document.querySelectorAll('.point')[2].dataset.tells")
    left, right = page.evaluate("[tooltip.getBoundingClientRect().left, tooltip.getBoundingClientRect().right]")
    assert left >= 0
    assert right <= 360
    assert page.complaints() == []


def test_without_scripts_table_map_figures_and_runs_are_there_and_no_dead_control_is(browser, path):
    page = Page(browser, path, scripts=False)
    page.send("DOM.enable")
    root = page.send("DOM.getDocument")["root"]["nodeId"]

    def boxes(selector):
        """Areas of the elements as they are laid out; 0 for one that is not shown."""
        areas = []
        for node in page.send("DOM.querySelectorAll", nodeId=root, selector=selector)["nodeIds"]:
            try:
                quad = page.send("DOM.getBoxModel", nodeId=node)["model"]
                areas.append(quad["width"] * quad["height"])
            except AssertionError:
                areas.append(0)
        return areas

    assert len(boxes("tbody.rows tr")) == 7
    for selector in ("tbody.rows tr", ".point", ".run-line", "img", "noscript p"):
        assert boxes(selector)
        assert min(boxes(selector)) >= 0
        assert max(boxes(selector)) > 0
    assert max(boxes("button, select, input, #tooltip")) == 0


def test_a_hostile_run_neither_runs_a_script_nor_widens_a_phone(browser, tmp_path):
    text = "</script><script>document.title='taken'</script>"
    text += "<img src=http://127.0.0.1:9/x onerror=\"document.title='taken'\">"
    for seed in (1, 2):
        for alpha in (0.2, 0.4):
            content = result(
                "kd", "abkd", point=(alpha, 0.0), seed=seed, environment={"torch": text, "device": "w" * 300}
            )
            content["recipe"]["note"] = text
            write_run(tmp_path / "runs", content, name=f"<svg onload=alert(1)>{'x' * 150}{seed}{alpha}")
    write_run(tmp_path / "runs", result(seed=3), {"state": "failed", "reason": text + "y" * 200})
    page = Page(browser, write(tmp_path, {}), width=360, height=800)
    page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
    assert page.evaluate("document.title") == "quickstart: test top-1 (%)"
    assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    assert page.evaluate("document.images.length") == 0
    page.hover(".point")
    assert "<svg onload=alert(1)>" in page.tooltip()
    assert page.happened("Page.javascriptDialogOpening") == []
    assert page.complaints() == []
    assert not [
        event for event in page.happened("Network.requestWillBeSent") if not event["request"]["url"].startswith("file:")
    ]
    # What were to get into the page all the same would be stopped by its policy.
    page.evaluate(
        "(() => { const made = document.createElement('script'); made.textContent = 'document.title = 1';"
        " document.body.append(made); })()"
    )
    image = "<img src=http://127.0.0.1:9/x onerror='document.title = 2'>"
    page.evaluate(f"document.body.insertAdjacentHTML('beforeend', {json.dumps(image)})")
    assert page.evaluate("document.title") == "quickstart: test top-1 (%)"
    assert any("Content Security Policy" in entry["text"] for entry in page.complaints())


def test_a_page_without_runs_of_a_grid_or_curves_has_no_errors(browser, tmp_path):
    write_run(tmp_path / "runs", result())
    page = Page(browser, write(tmp_path, {}))
    assert page.complaints() == []
    assert page.evaluate("document.querySelector('details[open]') !== null")
    assert page.texts(".runs .command code") == ["python -m vkd.train"]
