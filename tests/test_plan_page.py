"""The page of ``plan --html`` in a real browser: what it draws, and what a mouse, fingers and keys do."""

import io
import shutil

import pytest

from pipeline_ext.cli import main

Image = pytest.importorskip("PIL.Image", reason="needs pillow, which matplotlib brings")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra `test`")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FOUND = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(FOUND is None, reason="needs a browser: apt-get install chromium")

DESKTOP = {"width": 1280, "height": 900}
PHONE = {
    "viewport": {"width": 360, "height": 740},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}
SCHEDULES = ["1f1b", "zb-h1", "dualpipev"]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=FOUND, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page of three schedules, and of one that exceeds the memory limit."""
    file = tmp_path_factory.mktemp("page") / "plans.html"
    shape = "--ranks 4 --microbatches 12 --memory-limit 9".split()
    assert main(["plan", "--schedule", ",".join([*SCHEDULES, "gpipe"]), *shape, "--html", str(file)]) == 0
    return file.as_uri()


@pytest.fixture
def show(browser, address):
    """Opens the page; in the end it has logged nothing, and loaded nothing but itself."""
    contexts, complaints, loaded = [], [], set()

    def opened(**options):
        context = browser.new_context(**{"viewport": DESKTOP} | options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: loaded.add(request.url))
        page.goto(address)
        drawn(page)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    assert loaded == {address}


def drawn(page):
    """Waits until the page has drawn all it was asked to."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def pixels(page, panel, points):
    """Colors [r, g, b] on a panel's canvas at points, in CSS pixels."""
    shot = Image.open(io.BytesIO(page.locator("canvas").nth(panel).screenshot())).convert("RGB")
    ratio = page.evaluate("devicePixelRatio")
    return [list(shot.getpixel((int(x * ratio), int(y * ratio)))) for x, y in points]


def legend(page):
    """Name -> color."""
    script = """() => [...document.querySelectorAll("#legend li")].map(item =>
        [item.textContent, getComputedStyle(item.querySelector("i")).backgroundColor])"""
    return {
        name: [int(part) for part in color[4:-1].split(",")]  # of "rgb(1, 2, 3)"
        for name, color in page.evaluate(script)
    }


def seen(page):
    """The times at both ends of the axis."""
    return page.evaluate("[view.begin, view.end]")


def bars(page, panel):
    """Of each task: its kind, and a point at the left of its bar, above its number."""
    script = """panel => panels[panel].schedule.tasks.map(([kind, , , rank, lane, begin]) =>
        [kind, [panels[panel].x(begin) + 1.5, panels[panel].top(rank) + LANES[lane].below + 3]])"""
    return page.evaluate(script, panel)


def test_bars_have_the_colors_of_the_legend(show):
    page = show()
    colors = legend(page)
    assert list(colors) == [
        "F forward", "B backward", "I input gradient", "W weight gradient", "bubble", "memory",
    ]  # fmt: skip
    by_kind = {name[0]: color for name, color in colors.items()}
    for panel, kinds in enumerate(["FB", "FIW"]):  # with one stage a rank no bar is paler
        kind_of_bar, points = zip(*bars(page, panel), strict=True)
        assert set(kind_of_bar) == set(kinds) and len(points) == 12 * 4 * len(kinds)
        assert pixels(page, panel, points) == [by_kind[kind] for kind in kind_of_bar]
    assert page.evaluate("panels[0].x(6) > panels[0].x(5)")
    idle = page.evaluate("[panels[0].x(6), panels[0].top(0) + 3]")  # 1F1B's first rank waits from 4 to 10
    assert pixels(page, 0, [idle]) == [colors["bubble"]]
    memory = page.evaluate("[panels[0].x(6), panels[0].top(0) + ROW + STRIP - 1]")
    assert pixels(page, 0, [memory]) == [colors["memory"]]


def test_both_parts_of_a_pair_are_drawn(show):
    page = show()
    forward, backward = page.evaluate("""() => {
        const panel = panels[2], middle = row => panel.x((row[0].begin + row[0].end) / 2);
        return [[middle(panel.rows[1]) - 8, 3], [middle(panel.rows[2]) - 8, ROW / 2 + 3]];
    }""")
    colors, (upper, lower) = legend(page), pixels(page, 2, [forward, backward])
    assert upper == colors["F forward"]
    full = colors["B backward"]  # of the rank's first stage; this is its second
    assert lower != full and all(a <= b < 255 for a, b in zip(full, lower, strict=True))


def test_a_refused_schedule_is_shown_with_its_reason(show):
    page = show()
    assert page.locator("h2").all_text_contents() == [*SCHEDULES, "gpipe"]
    assert page.locator("canvas").count() == 3
    assert page.get_by_text("the rank would hold 10 of memory, its limit is 9").is_visible()
    assert "<-- ERROR HERE (rank 0)" in page.locator("pre").text_content()


def test_a_bar_tells_what_it_is(show):
    page = show()
    canvas, tip = page.locator("canvas").first, page.locator("#tip")
    x, y = page.evaluate("[panels[0].x(3.5), panels[0].top(0) + ROW / 2]")
    canvas.hover(position={"x": x, "y": y})
    assert tip.is_visible()
    assert tip.text_content() == "0F3  forward\nstage 0, microbatch 3, rank 0\n3 to 4, takes 1"
    canvas.hover(position={"x": page.evaluate("panels[0].x(6)"), "y": y})  # a bubble
    assert tip.is_hidden()
    canvas.hover(position={"x": page.evaluate("panels[0].x(44.9)"), "y": y})  # at the window's edge
    box = tip.bounding_box()
    assert box["x"] + box["width"] <= DESKTOP["width"]
    page.mouse.move(2, 2)
    assert tip.is_hidden()


def test_the_wheel_zooms_where_the_mouse_is(show):
    page = show()
    tip = page.locator("#tip")
    x, y = page.evaluate("[panels[0].x(10.5), panels[0].top(0) + ROW / 2]")
    page.locator("canvas").first.hover(position={"x": x, "y": y})
    before = page.evaluate("panels.map(panel => panel.canvas.toDataURL())")
    page.mouse.wheel(0, -400)
    drawn(page)
    begin, end = seen(page)
    assert end - begin == pytest.approx(45 / 2.71828, rel=1e-3)
    assert page.evaluate("x => panels[0].time(x)", x) == pytest.approx(10.5, abs=0.05)  # whole pixels
    after = page.evaluate("panels.map(panel => panel.canvas.toDataURL())")
    assert all(a != b for a, b in zip(before, after, strict=True))  # one axis for all panels
    page.locator("canvas").first.hover(position={"x": x, "y": y + 1})
    assert tip.text_content().startswith("0B0  backward")
    page.mouse.wheel(0, 4000)
    drawn(page)
    assert seen(page) == [0, 45]


def test_dragging_moves_the_bars_with_the_mouse(show):
    page = show()
    canvas = page.locator("canvas").first
    box = canvas.bounding_box()
    canvas.focus()
    for _ in range(4):
        page.keyboard.press("+")
    drawn(page)
    y = box["y"] + 11
    grabbed = page.evaluate("panels[0].time(500)")
    page.mouse.move(box["x"] + 500, y)
    page.mouse.down()
    page.mouse.move(box["x"] + 560, y)
    assert page.locator("#tip").is_hidden()
    page.mouse.move(box["x"] + 600, y + 200)  # below the canvas
    page.mouse.up()
    drawn(page)
    assert page.evaluate("panels[0].time(600)") == pytest.approx(grabbed)
    page.mouse.move(box["x"] + 700, y)
    drawn(page)
    assert page.evaluate("panels[0].time(600)") == pytest.approx(grabbed)  # the button is up
    page.mouse.dblclick(box["x"] + 600, y)
    drawn(page)
    assert seen(page) == [0, 45]


def test_keys_zoom_and_move(show):
    page = show()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement === panels[0].canvas")

    def after(key):
        page.keyboard.press(key)
        drawn(page)
        return seen(page)

    assert after("+") == pytest.approx([6.75, 38.25])
    assert after("ArrowRight") == pytest.approx([9.9, 41.4])
    assert after("ArrowLeft") == pytest.approx([6.75, 38.25])
    assert after("Control++") == pytest.approx([6.75, 38.25])  # is the browser's
    assert after("-") == pytest.approx([0, 45])
    assert after("=")[0] > 0
    assert after("Home") == [0, 45]
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement === panels[1].canvas")


def test_light_and_dark(show):
    page = show(color_scheme="light")

    def look():
        drawn(page)
        body = page.evaluate(
            "(({backgroundColor, color}) => [backgroundColor, color])(getComputedStyle(document.body))"
        )
        (_, forward), *_ = bars(page, 0)
        idle = page.evaluate("[panels[0].x(6), panels[0].top(0) + 3]")
        return [*body, *map(tuple, pixels(page, 0, [forward, idle])), str(legend(page))]

    light = look()
    page.emulate_media(color_scheme="dark")
    dark = look()
    assert all(a != b for a, b in zip(light, dark, strict=True))
    assert sum(light[3]) > 3 * 200 and sum(dark[3]) < 3 * 80  # the bubble
    page.emulate_media(color_scheme="light")
    assert look() == light


def test_on_a_phone(show):
    page = show(**PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["viewport"]["width"]
    kinds, points = zip(*bars(page, 0), strict=True)
    by_kind = {name[0]: color for name, color in legend(page).items()}
    assert pixels(page, 0, points) == [by_kind[kind] for kind in kinds]

    x, y = page.evaluate("[panels[0].x(8.5), panels[0].top(1) + ROW / 2]")
    page.locator("canvas").first.tap(position={"x": x, "y": y})
    assert page.locator("#tip").text_content().startswith("1B0  backward")
    box = page.locator("#tip").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["viewport"]["width"]

    box = page.locator("canvas").first.bounding_box()
    fingers = page.context.new_cdp_session(page)

    def touch(kind, *xs):
        points = [{"x": box["x"] + x, "y": box["y"] + y, "id": n} for n, x in enumerate(xs)]
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    ends = page.evaluate("[panels[0].time(150), panels[0].time(180)]")
    touch("touchStart", 150)
    touch("touchStart", 150, 180)
    for x in range(185, 241, 5):
        touch("touchMove", 150, x)
    touch("touchEnd")
    drawn(page)
    assert page.evaluate("[panels[0].time(150), panels[0].time(240)]") == pytest.approx(ends)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["viewport"]["width"]
