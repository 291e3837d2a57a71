"""The explorer's page in a real browser, without network: what is clicked, dragged and typed, and what then appears."""

from __future__ import annotations

import re

import numpy as np
import pytest

from analysis.error_types import CORRECT, ERRORS, above, classify_errors
from analysis.misalignment import spearman
from tests.tools.explored_pages import CLASSES, LONELY, SIZES, browser_program, made_objects, write_small

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -r requirements-dev.txt")
PROGRAM = browser_program()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no browser: apt-get install chromium")

CENTRE_OF_COLOUR = """([selector, [r, g, b]]) => {
    const canvas = document.querySelector(selector);
    const {data, width} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    let [n, x, y] = [0, 0, 0];
    for (let i = 0; i < data.length; i += 4) {
        if (Math.abs(data[i] - r) + Math.abs(data[i + 1] - g) + Math.abs(data[i + 2] - b) > 12) continue;
        n++; x += (i / 4) % width; y += Math.floor(i / 4 / width);
    }
    const scale = canvas.getBoundingClientRect().width / width;
    return n ? [x / n * scale, y / n * scale] : null;
}"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Directory of the page of two detectors, and the detectors."""
    out = tmp_path_factory.mktemp("pair")
    return out, write_small(out)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    out = tmp_path_factory.mktemp("single")
    return out, write_small(out, detectors=1)


@pytest.fixture
def open_page(browser):
    """Opens a page; at the end it must have complained of nothing and asked the network for nothing."""
    opened, problems = [], []

    def opener(out, width=1280, height=860):
        context = browser.new_context(
            viewport={"width": width, "height": height}, offline=True, reduced_motion="reduce"
        )
        page = context.new_page()
        opened.append(context)
        page.on("console", lambda message: message.type in ("error", "warning") and problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith("http") and problems.append(request.url))
        page.goto((out / "index.html").as_uri())
        wait_for_all(page)
        return page

    yield opener
    for context in opened:
        context.close()
    assert not problems


def wait_for_all(page) -> None:
    """Wait until the page has read and drawn everything."""
    page.wait_for_function("performance.getEntriesByName('complete').length")
    settle(page)


def settle(page) -> None:
    """Wait until everything is drawn that a change has called for; the pictures may come a little later."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.wait_for_function("document.querySelector('#grid').ariaBusy !== 'true'")


def set_threshold(page, side: int, step: int) -> None:
    page.locator(f"#threshold{side}").fill(str(step))
    settle(page)


def counts(page) -> list[list[int]]:
    """Of each kind, for each detector, as the page counts them."""
    texts = page.locator("#kinds .count").all_inner_texts()
    return [[int(number.replace(",", "")) for number in text.split("|")] for text in texts]


def expected_counts(detections, threshold: float) -> list[int]:
    images = [above(classify_errors(o, d), threshold) for o, d in zip(made_objects(), detections, strict=True)]
    kinds = np.bincount(np.concatenate([image.kind for image in images]), minlength=len(ERRORS))
    return [*kinds.tolist(), int(sum(image.missed.sum() for image in images))]


def test_a_click_on_a_confident_mistake_shows_its_picture(single, open_page):
    page = open_page(single[0])
    # Mistakes of other kinds lie elsewhere: the only one of the background above 0.8 is in a picture of its own.
    page.locator("#from").fill("0.8")
    settle(page)
    colour = [round(0.75 * c + 0.25 * 255) for c in (0xD5, 0x5E, 0x00)]
    place = page.evaluate(CENTRE_OF_COLOUR, [".plane", colour])
    assert place is not None
    page.locator("#from").fill("")
    settle(page)
    assert page.locator(".card").count() == len(SIZES)
    page.locator(".plane").first.hover(position={"x": place[0], "y": place[1]})
    assert page.locator(".tip").first.inner_text() == "bee .93 · IoU .00 · background"
    page.locator(".plane").first.click(position={"x": place[0], "y": place[1]})
    settle(page)
    assert page.locator("#how-many").inner_text() == "1 picture"
    assert "bee .93 · IoU .00 · background" in page.locator("#note").inner_text()
    card = page.locator(".card")
    assert card.count() == 1
    assert card.locator(".name").inner_text() == f"folder/photo{LONELY:02d}.jpg"
    strong = card.locator(".box.strong")
    assert strong.count() == 1
    rect = strong.locator("rect").last
    drawn = [float(rect.get_attribute(name)) for name in ("x", "y", "width", "height")]
    assert drawn == pytest.approx([10, 20, 80, 40], abs=0.01)
    page.keyboard.press("Escape")
    settle(page)
    assert page.locator(".card").count() == len(SIZES)


def test_a_rectangle_shows_the_pictures_of_its_boxes(single, open_page):
    page = open_page(single[0])
    box = page.locator(".plane").first.bounding_box()
    start, end = (0.35, 0.15), (0.75, 0.5)
    page.mouse.move(box["x"] + start[0] * box["width"], box["y"] + start[1] * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + end[0] * box["width"], box["y"] + end[1] * box["height"], steps=4)
    page.mouse.up()
    settle(page)
    numbers = [float(n) for n in re.findall(r"\d\.\d\d", page.locator("#note").inner_text())]
    low, high, least, most = numbers
    assert low < high
    assert least < most
    titles = page.locator(".card .box.strong[data-detection] title").all_text_contents()
    assert titles
    for title in titles:
        score, iou = (float(n) for n in re.findall(r"(?:^| )(\.\d\d|\d\.\d\d)", title)[:2])
        assert low - 0.01 <= score <= high + 0.01
        assert least - 0.01 <= iou <= most + 0.01
    for i in range(page.locator(".card").count()):
        assert page.locator(".card").nth(i).locator(".box.strong").count() > 0


def test_the_slider_moves_counts_and_boxes(single, open_page):
    out, (detector,) = single
    page = open_page(out)
    slider = page.locator("#threshold0").bounding_box()
    page.mouse.move(slider["x"] + slider["width"] / 2, slider["y"] + slider["height"] / 2)
    page.mouse.down()
    page.mouse.move(slider["x"] + 0.7 * slider["width"], slider["y"] + slider["height"] / 2, steps=5)
    settle(page)
    before = float(page.locator(".threshold .value").first.inner_text())
    page.mouse.move(slider["x"] + 0.3 * slider["width"], slider["y"] + slider["height"] / 2, steps=5)
    page.mouse.up()
    settle(page)
    after = float(page.locator(".threshold .value").first.inner_text())
    assert after < 0.4 < 0.6 < before
    assert [number for (number,) in counts(page)] == expected_counts(detector.detections, after)
    shown = sum(expected_counts(detector.detections, after)[:-1])
    assert page.locator(".card [data-detection]").count() == shown
    page.keyboard.press("]")
    settle(page)
    assert float(page.locator(".threshold .value").first.inner_text()) == pytest.approx(after + 0.01)


@pytest.mark.parametrize("step", [0, 41, 120])
def test_precision_recall_and_kinds_agree_with_the_analysis(pair, open_page, step):
    out, detectors = pair
    page = open_page(out)
    for side in (0, 1):
        set_threshold(page, side, step)
    expected = [expected_counts(detector.detections, step / 200) for detector in detectors]
    assert counts(page) == [list(both) for both in zip(*expected, strict=True)]
    asked = sum(int((~truth.crowd).sum()) for truth in made_objects())
    for side, kinds in enumerate(expected):
        right, wrong = kinds[CORRECT], sum(kinds[1:-1])
        text = page.locator(".threshold .numbers").nth(side).inner_text()
        numbers = [float(number) for number in re.findall(r"[\d.]+(?=\u00a0%)", text)]
        f1 = 2 * right / (asked + right + wrong)
        assert numbers == pytest.approx([100 * right / (right + wrong), 100 * right / asked, 100 * f1], abs=0.051)


def test_the_best_threshold_has_the_highest_f1(single, open_page):
    out, (detector,) = single
    page = open_page(out)
    asked = sum(int((~truth.crowd).sum()) for truth in made_objects())

    images = [classify_errors(o, d) for o, d in zip(made_objects(), detector.detections, strict=True)]
    scores = np.concatenate([image.detections.scores for image in images])
    correct = np.concatenate([image.kind == CORRECT for image in images])

    def f1(step: int) -> float:
        reached = scores >= step / 200
        return 2 * int((correct & reached).sum()) / (asked + int(reached.sum()))

    start = round(200 * float(page.locator(".threshold .value").first.inner_text()))
    assert f1(start) == pytest.approx(max(f1(step) for step in range(201)))


def test_rank_correlation_is_that_of_the_analysis(single, open_page):
    out, (detector,) = single
    page = open_page(out)
    set_threshold(page, 0, 0)
    from analysis.exploration import judge

    judged = [judge(o, d) for o, d in zip(made_objects(), detector.detections, strict=True)]
    expected = spearman(
        np.concatenate([image.detections.scores for image in judged]), np.concatenate([image.iou for image in judged])
    )
    text = page.locator(".plane-of .reading").first.inner_text()
    assert float(text.split()[-1].replace("−", "-")) == pytest.approx(expected, abs=0.0051)


def test_filters_leave_what_they_say(single, open_page):
    out, (detector,) = single
    page = open_page(out)
    set_threshold(page, 0, 20)
    page.locator("#class").select_option(label="cat <b>")
    page.locator("#kinds .chip").nth(2).click()
    settle(page)
    titles = page.locator(".card .box.strong[data-detection] title").all_text_contents()
    assert titles
    assert all(title.startswith("cat <b> ") and title.endswith("localisation") for title in titles)
    images = [above(classify_errors(o, d), 0.1) for o, d in zip(made_objects(), detector.detections, strict=True)]
    assert len(titles) == sum(int(((i.kind == 2) & (i.detections.labels == 2)).sum()) for i in images)
    page.keyboard.press("0")
    page.locator("#search").fill("PHOTO1")
    settle(page)
    assert page.locator(".card").count() == 2
    assert page.locator("#reset").is_visible()


def test_missed_objects_can_be_asked_for(single, open_page):
    out, (detector,) = single
    page = open_page(out)
    set_threshold(page, 0, 130)
    page.locator("#kinds .chip").last.click()
    settle(page)
    expected = expected_counts(detector.detections, 0.65)[-1]
    assert expected > 0
    assert page.locator(".card .box.annotated.strong").count() == expected


def test_changes_are_counted_and_shown(pair, open_page):
    out, detectors = pair
    page = open_page(out)
    for side in (0, 1):
        set_threshold(page, side, 60)
    page.keyboard.press("5")
    settle(page)
    found: list[dict[tuple[int, int], float]] = []
    for detector in detectors:
        scores = {}
        for place, (truth, made) in enumerate(zip(made_objects(), detector.detections, strict=True)):
            image = above(classify_errors(truth, made), 0.3)
            for score, kind, target in zip(image.detections.scores, image.kind, image.target, strict=True):
                if kind == CORRECT:
                    scores[place, int(target)] = float(score)
        found.append(scores)
    only_a, only_b, both = found[0].keys() - found[1], found[1].keys() - found[0], found[0].keys() & found[1]
    shown = [int(text) for text in page.locator(".changes strong").all_inner_texts()]
    assert shown[:2] == [len(only_a), len(only_b)]
    assert shown[2] == sum(found[0][key] != found[1][key] for key in both)
    page.locator(".changes button").nth(2).click()
    settle(page)
    moved: dict[int, float] = {}
    for place, target in both:
        change = abs(found[0][place, target] - found[1][place, target])
        moved[place] = max(moved.get(place, 0), change)
    order = sorted((place for place in moved if moved[place]), key=lambda place: -moved[place])
    names = page.locator(".card .name").all_inner_texts()
    assert names == [f"folder/photo{place:02d}.jpg" for place in order]
    assert page.locator(".card").first.locator("svg").count() == 2


def test_cells_of_the_confusion_matrix_pick_boxes(single, open_page):
    out, (detector,) = single
    page = open_page(out)
    set_threshold(page, 0, 10)
    page.keyboard.press("3")
    settle(page)
    canvas = page.locator(".matrix").bounding_box()
    images = [(o, above(classify_errors(o, d), 0.05)) for o, d in zip(made_objects(), detector.detections, strict=True)]
    page.evaluate("""() => {
        const [matrix, reading] = ['.matrix', '#panel-confusion .reading'].map(name => document.querySelector(name));
        window.readings = new Set();
        matrix.addEventListener('pointermove', () => readings.add(reading.innerText));
    }""")
    for y in range(4, int(canvas["height"]), 16):  # where cells begin depends on the font
        for x in range(4, int(canvas["width"]), 16):
            page.mouse.move(canvas["x"] + x, canvas["y"] + y)
    seen = page.evaluate("[...readings]")
    read = {text.rsplit(": ", 1)[0]: int(text.rsplit(": ", 1)[1]) for text in seen if text}
    assert len(read) == (len(CLASSES) + 1) ** 2
    for row, name in enumerate(CLASSES):
        for column, said in enumerate(CLASSES):
            count = sum(
                int(((i.detections.labels == column) & (i.labels[i.target] == row) & np.isin(i.kind, (0, 1))).sum())
                for _, i in images
                if len(i.labels)
            )
            assert read[f"{name} found" if row == column else f"{name} taken for {said}"] == count
    page.mouse.click(canvas["x"] + 0.97 * canvas["width"], canvas["y"] + 0.4 * canvas["height"])
    settle(page)
    assert re.search(r"with (ant|bee|cat <b>) missed", page.locator("#note").inner_text())
    assert page.locator(".card .box.annotated.strong").count() > 0


def test_the_table_sorts_and_filters(single, open_page):
    page = open_page(single[0])
    page.keyboard.press("4")
    settle(page)
    for _ in range(2):
        page.locator(".classes thead button").nth(2).click()
    values = [float(row.locator("td").nth(1).inner_text()) for row in page.locator(".classes tbody tr").all()]
    assert values in (sorted(values), sorted(values, reverse=True))
    page.locator(".classes tbody button", has_text="bee").click()
    settle(page)
    assert page.locator("#class").input_value() == "1"
    assert all(
        t.startswith("bee ") for t in page.locator(".card .box.strong[data-detection] title").all_text_contents()
    )


def test_curves_set_the_threshold(single, open_page):
    page = open_page(single[0])
    page.keyboard.press("2")
    settle(page)
    box = page.locator(".chart").first.bounding_box()
    page.mouse.click(box["x"] + 44 + 0.5 * (box["width"] - 56), box["y"] + 60)
    settle(page)
    assert float(page.locator(".threshold .value").first.inner_text()) == pytest.approx(0.5, abs=0.011)


def test_curves_bring_both_to_the_same_recall(pair, open_page):
    page = open_page(pair[0])
    page.keyboard.press("2")
    set_threshold(page, 0, 100)
    set_threshold(page, 1, 20)
    box = page.locator(".chart").first.bounding_box()
    page.mouse.click(box["x"] + 44 + 0.2 * (box["width"] - 56), box["y"] + 60)
    settle(page)
    steps = [int(page.locator(f"#threshold{side}").input_value()) for side in (0, 1)]
    assert steps[0] == 100
    assert steps[1] == pytest.approx(40, abs=2)
    page.locator(".chart").nth(1).scroll_into_view_if_needed()
    box = page.locator(".chart").nth(1).bounding_box()
    page.mouse.click(box["x"] + 44 + 0.4 * (box["width"] - 56), box["y"] + 60)
    settle(page)
    asked = sum(int((~truth.crowd).sum()) for truth in made_objects())
    for side, detector in enumerate(pair[1]):
        step = int(page.locator(f"#threshold{side}").input_value())
        found = [expected_counts(detector.detections, at / 200)[CORRECT] for at in (step, step + 1)]
        assert found[0] >= 0.39 * asked
        assert found[1] <= 0.41 * asked


def test_a_picture_large_by_keyboard(pair, open_page):
    page = open_page(pair[0])
    page.keyboard.press("j")
    first = page.locator("#detail-title").inner_text()
    assert page.locator("#detail svg").count() == 2
    page.keyboard.press("ArrowRight")
    assert page.locator("#detail-title").inner_text() != first
    rows = page.locator("#detail .column").first.locator("tbody tr")
    assert rows.count() > 0
    page.keyboard.press("Escape")
    assert not page.locator("#detail").is_visible()


def test_best_regressed_queries_have_a_plane(pair, open_page):
    page = open_page(pair[0])
    page.keyboard.press("b")
    settle(page)
    asked = sum(int((~truth.crowd).sum()) for truth in made_objects())
    reading = page.locator(".plane-of .reading").first.inner_text()
    assert reading.startswith(f"{asked} queries")
    best = pair[1][0].best
    ranks = np.concatenate([b.rank < b.num_targets for b in best])
    found = np.concatenate([b.iou > 0 for b in best])
    assert f"{100 * ranks[found].mean():.1f}\u00a0%" in reading


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(pair, open_page, width):
    page = open_page(pair[0], width=width, height=800)
    for key in "12345":
        page.keyboard.press(key)
        settle(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.keyboard.press("j")
    settle(page)
    assert page.evaluate("document.querySelector('#detail').scrollWidth") <= width


def test_an_address_keeps_what_is_looked_at(pair, open_page):
    page = open_page(pair[0])
    page.keyboard.press("4")
    page.locator("#class").select_option(label="bee")
    page.locator("#search").fill("photo0")
    set_threshold(page, 1, 77)
    page.wait_for_function("location.hash.includes('photo0') && location.hash.includes('77')")
    names = page.locator(".card .name").all_inner_texts()
    page.reload()
    wait_for_all(page)
    assert page.locator("#panel-classes").is_visible()
    assert page.locator("#search").input_value() == "photo0"
    assert page.locator("#threshold1").input_value() == "77"
    assert page.locator(".card .name").all_inner_texts() == names
    page.goto("about:blank")
    page.goto((pair[0] / "index.html").as_uri() + "#tab=7&sides=[9]&steps=no&label=1")
    wait_for_all(page)
    assert page.locator("#class").input_value() == "1"
    assert page.locator("#panel-plane").is_visible()


def test_a_picture_that_is_pointed_at_rings_its_boxes(single, open_page):
    page = open_page(single[0])
    drawing = "document.querySelector('.plane').toDataURL()"
    before = page.evaluate(drawing)
    page.locator(".card [data-detection]").first.hover(force=True)
    settle(page)
    assert page.evaluate(drawing) != before
    page.locator("#how-many").hover()
    settle(page)
    assert page.evaluate(drawing) == before
