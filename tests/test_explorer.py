"""The explorer page: the content of its file, and its behavior in a real headless browser.

Mutations tried by hand; each makes at least one test here fail: groups of keys at the border; the
decades of the scale, on either side; data that can close the script element; in the page rows and
columns swapped, the pointer not relative to the image, the canvas half a cell off, always the first
map, a pin that does not hold, touch that does not move, signs lost.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
import zlib

import numpy as np
import pytest
import torch
import torch.nn as nn
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from nonlocal_det import NonLocalBlock
from nonlocal_det.attention import AttentionQuery, AttentionRecorder, explorer_page
from nonlocal_det.attention.figures.explorer import (
    DECADES,
    MAX_BYTES,
    _block_means,
    _downsampling_factors,
    encode,
)
from nonlocal_det.attention.recording.geometry import Grid

WIDTH, HEIGHT = 120, 80
QUERIES = [
    AttentionQuery((35.0, 25.0), "1 left </script> 90%", (10.0, 10.0, 60.0, 40.0)),
    AttentionQuery((90.0, 60.0), "2 right 80%", (70.0, 45.0, 110.0, 75.0)),
]


class Detector(nn.Module):
    """Three blocks: two on the whole image, unsigned and signed, and one in a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, stride=8)
        self.plain = NonLocalBlock(8)
        self.signed = NonLocalBlock(8, pairwise="dot_product", subsample=2)
        self.pooler = ROIPooler(6, scales=[1 / 8], sampling_ratio=0, pooler_type="ROIAlignV2")
        self.head = NonLocalBlock(8)

    def forward(self, image):
        x = self.signed(self.plain(self.stem(image)))
        boxes = [Boxes(torch.tensor([query.box for query in QUERIES]))]
        return self.head(self.pooler([x], boxes))


@pytest.fixture(scope="module")
def recorder() -> AttentionRecorder:
    torch.manual_seed(0)
    with torch.no_grad(), AttentionRecorder(Detector().eval()) as recorder:
        recorder._model(torch.rand(1, 3, HEIGHT, WIDTH))
    return recorder


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)


@pytest.fixture(scope="module")
def page(recorder, image) -> str:
    return explorer_page(image, QUERIES, recorder, title="<a> & b.png")


def decoded(codes: np.ndarray, maxima: np.ndarray, signed: bool) -> np.ndarray:
    """The weights that codes (Q, M) stand for."""
    top = 127 if signed else 255
    magnitude = (codes & 127 if signed else codes).astype(float)
    values = 10.0 ** (((magnitude - 1) / (top - 1) - 1) * DECADES) * (magnitude > 0)
    return values * maxima[:, None] * np.where(signed & (codes > 127), -1, 1)


@pytest.mark.parametrize("signed, error", [(False, 0.02), (True, 0.04)])
def test_codes_keep_four_decades(signed, error):
    magnitudes = np.float32([1.0, 0.5, 0.1, 0.0123, 1.1e-4])
    values = np.stack([magnitudes * 3e-3, np.zeros(5, np.float32)])
    if signed:
        values[0, 1::2] *= -1
    maxima, codes = encode(values, signed)
    assert codes.dtype == np.uint8
    np.testing.assert_allclose(decoded(codes, maxima, signed), values, rtol=error)
    assert encode(np.float32([[1.0, 0.9e-4]]), signed)[1][0, 1] == 0


def test_means_at_the_border_are_over_existing_keys():
    values = np.arange(15.0).reshape(1, 3, 5)
    # Rows 0 and 1, columns 0 and 1: 0, 1, 5, 6; the corner is 14 alone.
    expected = [[[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]]]
    np.testing.assert_array_equal(_block_means(values, 2), expected)
    np.testing.assert_array_equal(_block_means(values, 1), values)


def test_page_of_a_large_image_stays_below_its_limit():
    bounds = (0.0, 0.0, 1333.0, 800.0)
    for stride in (4, 8, 16, 32):
        grid = Grid(0, 0, stride, stride, -(-1333 // stride), -(-800 // stride), bounds)
        query_factor, key_factor = _downsampling_factors(grid, grid, 1.7e6)
        queries, keys = grid.downsampled(query_factor), grid.downsampled(key_factor)
        assert queries.columns * queries.rows * keys.columns * keys.rows <= 1.7e6
    assert _downsampling_factors(grid, grid, 1.7e6) == (1, 1)


class White(nn.Module):
    """Features of white noise, which does not compress."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(NonLocalBlock(4, pairwise="dot_product") for _ in range(3))

    def forward(self, image):
        for block in self.blocks:
            block(torch.randn(1, 4, 50, 84))


def test_page_of_noise_with_several_large_blocks_stays_below_its_limit():
    noise = np.random.default_rng(0).integers(0, 255, (800, 1333, 3), np.uint8)
    with torch.no_grad(), AttentionRecorder(White()) as recorder:
        recorder._model(torch.zeros(1, 3, 800, 1333))
    page = explorer_page(noise, [], recorder, title="noise")
    assert MAX_BYTES / 3 < len(page.encode()) < MAX_BYTES


def test_page_is_self_contained_and_escapes_its_input(page):
    assert "<title>&lt;a&gt; &amp; b.png" in page
    assert not re.search(r"https?://|src=\"(?!data:)|@import|url\(", page)
    assert "</script> 90%" not in page
    assert page.count("</script>") == 2


def test_page_without_blocks_or_queries(image):
    empty = AttentionRecorder(nn.Identity())
    with empty:
        empty._model(torch.zeros(1, 3, HEIGHT, WIDTH))
    assert '"blocks": []' in explorer_page(image, [], empty, title="nothing")


def test_page_holds_the_maps_of_the_recorder(page, recorder):
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1])
    block = data["blocks"][0]
    view = block["views"][0]
    assert (block["name"], view["factors"], view["queries"]["columns"]) == ("plain", [1, 1], 15)
    codes = np.frombuffer(zlib.decompress(base64.b64decode(view["codes"])), np.uint8)
    maxima = np.frombuffer(base64.b64decode(view["maxima"]), "<f4")
    values = decoded(codes.reshape(150, 150), maxima, block["signed"])
    # The cell in column 4 and row 7.
    expected = recorder.attention_rows("plain", [(36, 60)])[0][0].ravel()
    close = np.abs(values[7 * 15 + 4] - expected) <= 0.02 * expected + 1e-4 * expected.max()
    assert close.all()


def browser():
    """Start headless Chromium, or skip the test with the reason."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(programs):
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    # Without a sandbox, as root in a container.
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(programs[1])
    return webdriver.Chrome(options=options, service=service)


@pytest.fixture(scope="module")
def driver():
    driver = browser()
    yield driver
    driver.quit()


def resize(driver, width: int, height: int, *, touch: bool = False, dark: bool = False) -> None:
    """Give the window the size and the input of a laptop or a phone."""
    size = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": touch}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


@pytest.fixture
def opened(driver, page, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    resize(driver, 1366, 768)
    driver.get(path.as_uri())
    settle(driver)
    release(driver)
    yield driver
    assert driver.get_log("browser") == []


def release(driver) -> None:
    """Release the pin with which a page opens, so that the pointer moves the point."""
    from selenium.webdriver.common.keys import Keys

    press(driver, Keys.ESCAPE)


def settle(driver) -> None:
    """Wait until the attention maps of the block are decompressed and drawn."""
    driver.execute_async_script(
        "const done = arguments[0];"
        "const wait = () => explorer.data.blocks[explorer.state.block].views[0].values"
        " ? requestAnimationFrame(() => requestAnimationFrame(done)) : setTimeout(wait, 10);"
        "wait();"
    )


def press(driver, *keys: str, held: str = "") -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    actions = ActionChains(driver)
    if held:
        actions.key_down(held)
    actions.send_keys(*keys)
    if held:
        actions.key_up(held)
    actions.perform()
    settle(driver)


def on_screen(driver, x: float, y: float) -> tuple[float, float]:
    """Convert a point of the image to window coordinates."""
    box = driver.execute_script(
        "const b = document.getElementById('stage').getBoundingClientRect();"
        "return [b.left, b.top, b.width, b.height]"
    )
    return box[0] + x / WIDTH * box[2], box[1] + y / HEIGHT * box[3]


def mouse(driver, kind: str, x: float, y: float) -> None:
    """Dispatch a mouse event at a point of the image."""
    at = on_screen(driver, x, y)
    event = {"type": kind, "x": at[0], "y": at[1], "button": "none"}
    if kind != "mouseMoved":
        event.update(button="left", clickCount=1)
    driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)
    settle(driver)


def click(driver, x: float, y: float) -> None:
    mouse(driver, "mousePressed", x, y)
    mouse(driver, "mouseReleased", x, y)


def shown(driver) -> np.ndarray:
    """The attention map that the page shows, (R, C)."""
    found = driver.execute_script(
        "const m = explorer.map();"
        "return m && [m.view.keys.rows, m.view.keys.columns, m.maximum, [...m.weights]]"
    )
    if found is None:
        return None
    return np.array(found[3]).reshape(found[0], found[1]) * found[2]


def point(driver) -> list[float]:
    return driver.execute_script("return explorer.state.point")


def text(driver, name: str) -> str:
    return driver.execute_script(f"return document.getElementById({name!r}).innerText")


def set_control(driver, name: str, value: str) -> None:
    driver.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change'))",
        name,
        value,
    )
    settle(driver)


def assert_is_the_recorders(driver, recorder, block, at, box=None):
    boxes = None if box is None else [box]
    expected = recorder.attention_rows(block, [at], roi_boxes=boxes)[0][0]
    tolerance = 0.04 * np.abs(expected) + 1.1e-4 * np.abs(expected).max()
    assert (np.abs(shown(driver) - expected) <= tolerance).all()


def test_map_under_the_pointer_is_the_recorders(opened, recorder):
    for at in [(3, 3), (117, 5), (61.5, 44.5), (119.5, 79.5), (20, 70)]:
        mouse(opened, "mouseMoved", *at)
        np.testing.assert_allclose(point(opened), at, atol=0.2)
        assert_is_the_recorders(opened, recorder, "plain", at)
    set_control(opened, "block", "1")
    assert_is_the_recorders(opened, recorder, "signed", (20, 70))
    mouse(opened, "mouseMoved", 100, 10)
    assert_is_the_recorders(opened, recorder, "signed", (100, 10))


def test_block_in_a_head_shows_the_detection_under_the_pointer(opened, recorder):
    set_control(opened, "block", "2")
    for query in QUERIES:
        at = (query.box[0] + 3, query.box[3] - 4)
        mouse(opened, "mouseMoved", *at)
        assert_is_the_recorders(opened, recorder, "head", at, query.box)
    mouse(opened, "mouseMoved", 2, 78)
    assert shown(opened) is None
    assert "move into a box" in text(opened, "readout")


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_canvas_shows_the_recorders_map_at_its_position(opened, recorder, scale):
    set_control(opened, "scale", scale)
    set_control(opened, "opacity", "100")
    press(opened, "a")  # no arrows
    for at in [(30, 30), (100, 70)]:
        mouse(opened, "mouseMoved", *at)
        attn_map = recorder.attention_maps("plain", [at])[0]
        attn_map = attn_map / attn_map.max()
        if scale == "log":
            attn_map = np.clip(1 + np.log10(np.maximum(attn_map, 1e-9)) / DECADES, 0, 1)
        luminance = pixels(opened) @ [0.3, 0.6, 0.1]
        # Away from the dot of the point itself, and from the borders.
        rows, columns = np.indices(luminance.shape)
        inside = np.hypot(columns - at[0], rows - at[1]) > 4
        inside &= (rows > 7) & (rows < HEIGHT - 8) & (columns > 7) & (columns < WIDTH - 8)

        def correlation(
            down: int, right: int, luminance=luminance, attn_map=attn_map, inside=inside
        ) -> float:
            shifted = np.roll(attn_map, (down, right), (0, 1))
            return np.corrcoef(luminance[inside], shifted[inside])[0, 1]

        # Not 1, for dark colors are quantized; a shift by a quarter of a cell correlates less.
        assert correlation(0, 0) > 0.95
        assert correlation(0, 0) > max(correlation(*d) for d in [(0, 2), (0, -2), (2, 0), (-2, 0)])


def pixels(driver) -> np.ndarray:
    """The canvas resampled to the pixels of the image, RGB (HEIGHT, WIDTH, 3)."""
    data = driver.execute_script(
        "const shown = document.getElementById('canvas'), c = document.createElement('canvas');"
        "[c.width, c.height] = arguments;"
        "const pen = c.getContext('2d'); pen.imageSmoothingQuality = 'high';"
        "pen.drawImage(shown, 0, 0, c.width, c.height);"
        "return [...pen.getImageData(0, 0, c.width, c.height).data]",
        WIDTH,
        HEIGHT,
    )
    return np.array(data, float).reshape(HEIGHT, WIDTH, 4)[..., :3]


def test_the_page_opens_on_the_first_detection(opened, recorder):
    """Pinned, so that the pointer, wherever it is, does not change what one sees first."""
    opened.refresh()
    settle(opened)
    mouse(opened, "mouseMoved", 100, 60)
    assert point(opened) == list(QUERIES[0].point)
    assert_is_the_recorders(opened, recorder, "plain", QUERIES[0].point)
    pressed = "return [...document.querySelectorAll('#queries button')].map(b => b.ariaPressed)"
    assert opened.execute_script(pressed) == ["true", "false"]
    assert "the brighter a place, the larger its attention weight" in text(opened, "lead")


def test_the_largest_weight_is_told_in_words(opened, recorder):
    for x, y in [(30.0, 30.0), (100.0, 70.0), (3.0, 77.0)]:
        mouse(opened, "mouseMoved", x, y)
        [(weights, _)] = recorder.attention_rows("plain", [(x, y)])
        [(key_x, key_y, largest)] = recorder.top_k("plain", (x, y), 1)
        found = re.search(r"([\d.]+) times the mean, (.*)\.", text(opened, "readout"))
        assert float(found[1]) == pytest.approx(largest / weights.mean(), rel=0.06)
        side, length = found[2].split(", ")[-1], math.hypot(key_x - x, key_y - y)
        if abs(key_x - x) <= 8 and abs(key_y - y) <= 8:
            assert side == "at the point itself"
            continue
        assert f"{length:.0f} pixels away" in found[2]
        sideways = "to the right" if key_x > x else "to the left"
        assert side == (
            sideways if abs(key_x - x) >= abs(key_y - y) else "below" if key_y > y else "above"
        )


LOSSES = np.array([[[0.5, -2.0, 0.0], [0.1, 0.2, 1.0]], [[0.0, 0.0, 0.0], [0.0, 3.0, 0.0]]])


def test_influence_on_the_selected_detection(driver, recorder, image, tmp_path):
    page = explorer_page(image, QUERIES, recorder, title="x", influence={"plain": LOSSES})
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    resize(driver, 1366, 768)
    driver.get((tmp_path / "page.html").as_uri())
    settle(driver)
    assert_is_the_recorders(driver, recorder, "plain", QUERIES[0].point)
    press(driver, "i")
    np.testing.assert_allclose(shown(driver), LOSSES[0], rtol=0.04, atol=2e-4)
    # Cells are 40 pixels wide and high: the middle of the first row's second one.
    assert "Without the place around 60, 20" in text(driver, "readout")
    assert "gains 2," in text(driver, "readout") and "loses" in text(driver, "lead")
    press(driver, "n")
    np.testing.assert_allclose(shown(driver), LOSSES[1], rtol=0.04, atol=2e-4)
    assert "loses 3," in text(driver, "readout")
    release(driver)
    mouse(driver, "mouseMoved", 20, 20)
    assert shown(driver) is None and "Choose a detection" in text(driver, "readout")
    set_control(driver, "block", "1")  # for which no influence was computed
    mouse(driver, "mouseMoved", 30, 30)
    assert_is_the_recorders(driver, recorder, "signed", (30, 30))
    press(driver, "i")
    assert driver.execute_script("return explorer.state.shown") == "attention"
    assert driver.get_log("browser") == []


def test_the_map_can_be_hidden(opened):
    assert opened.execute_script("return document.getElementById('shown-field').hidden") is True
    press(opened, "a")
    mouse(opened, "mouseMoved", 30, 30)
    assert (pixels(opened)[60:, 80:] > 0).any()
    press(opened, "m")
    assert (pixels(opened)[60:, 80:] == 0).all()
    assert opened.execute_script("return document.getElementById('map').checked") is False
    press(opened, "m")
    assert (pixels(opened)[60:, 80:] > 0).any()


def test_click_pins_and_releases(opened):
    mouse(opened, "mouseMoved", 30, 30)
    click(opened, 40, 30)
    mouse(opened, "mouseMoved", 90, 60)
    np.testing.assert_allclose(point(opened), (40, 30), atol=0.2)
    assert "Pinned at" in text(opened, "readout")
    click(opened, 90, 60)
    np.testing.assert_allclose(point(opened), (90, 60), atol=0.2)
    click(opened, 90, 60)
    mouse(opened, "mouseMoved", 10, 10)
    np.testing.assert_allclose(point(opened), (10, 10), atol=0.2)


def test_keyboard(opened, recorder):
    from selenium.webdriver.common.keys import Keys

    opened.execute_script("document.getElementById('stage').focus()")
    press(opened, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    # Cells are 8 pixels wide; the initial point is the first detection.
    assert point(opened) == [43, 33]
    assert_is_the_recorders(opened, recorder, "plain", (43, 33))
    press(opened, Keys.ARROW_LEFT, held=Keys.SHIFT)
    assert point(opened) == [3, 33]
    press(opened, Keys.ARROW_LEFT, held=Keys.SHIFT)
    assert point(opened) == [0, 33]
    press(opened, "n")
    assert point(opened) == list(QUERIES[0].point)
    press(opened, "n")
    assert point(opened) == list(QUERIES[1].point)
    press(opened, "b")
    assert_is_the_recorders(opened, recorder, "signed", QUERIES[1].point)
    press(opened, "l")
    assert opened.execute_script("return explorer.state.scale") == "log"
    press(opened, Keys.ESCAPE)
    assert opened.execute_script("return explorer.state.pinned") is False
    press(opened, Keys.ENTER)
    assert opened.execute_script("return explorer.state.pinned") is True


def test_detections_are_selected_from_the_list(opened, recorder):
    buttons = opened.find_elements("css selector", "#queries button")
    assert [button.text for button in buttons] == [query.label for query in QUERIES]
    buttons[1].click()
    settle(opened)
    assert_is_the_recorders(opened, recorder, "plain", QUERIES[1].point)
    assert [b.get_attribute("aria-pressed") for b in buttons] == ["false", "true"]


def test_touch(opened, recorder):
    resize(opened, 390, 844, touch=True)
    settle(opened)
    for kind, at in (("touchStart", (30, 20)), ("touchMove", (95, 65)), ("touchEnd", None)):
        points = [] if at is None else [dict(zip("xy", on_screen(opened, *at)))]
        event = {"type": kind, "touchPoints": points}
        opened.execute_cdp_cmd("Input.dispatchTouchEvent", event)
        settle(opened)
    np.testing.assert_allclose(point(opened), (95, 65), atol=0.5)
    assert_is_the_recorders(opened, recorder, "plain", (95, 65))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width, height, touch", [(1366, 768, False), (390, 844, True)])
def test_page_fits_its_window(opened, width, height, touch, dark, tmp_path):
    resize(opened, width, height, touch=touch, dark=dark)
    settle(opened)
    wide, stage = opened.execute_script(
        "const b = document.getElementById('stage').getBoundingClientRect();"
        "return [document.documentElement.scrollWidth, [b.left, b.top, b.right, b.bottom]]"
    )
    assert wide <= width
    # The whole image is visible without scrolling, and it is large.
    assert stage[0] >= 0 and stage[2] <= width and stage[3] <= height
    assert stage[2] - stage[0] > width * 0.6
    paper = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", paper)[:3])) > 380
    assert light is not dark
    if os.environ.get("EXPLORER_SHOTS"):
        name = f"{width}-{'dark' if dark else 'light'}.png"
        opened.save_screenshot(os.path.join(os.environ["EXPLORER_SHOTS"], name))
