"""The app in a browser: every tab and every button.

RUN=FOLDER selects another run; SCREENSHOTS=FOLDER saves screenshots, and -s prints how long actions took.
"""

from __future__ import annotations

import gc
import io
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from configs.run_dir import REPOSITORY
from pipelines import Generator
from pipelines.app import main, served
from pipelines.playground.edits import Place, most_likely_codes, nearest_codes, replaced, walk
from pipelines.playground.fill_tab import BRUSH, SIDE
from pipelines.sample import main as sample
from stage1_vqvae.train import main as train_tokenizer
from stage2_prior.train import main as train_prior
from tests.browser import PHONE, Visit, chromium, visit


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = os.environ.get("RUN")
    return Path(path) if path else Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("app") / "run"))


@pytest.fixture(scope="module")
def generator(run: Path) -> Generator:
    return Generator.from_pretrained(run, device="cpu")


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    """The address that the command prints, while the app runs; a proxy that does not exist must not be used."""
    command = [sys.executable, str(REPOSITORY / "pipelines/app.py"), "--run", str(run)]
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:9"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            yield next(line for line in process.stdout if line.startswith("open ")).split()[1]
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
    assert process.returncode == 0


@pytest.fixture
def gradio_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set up gradio in this process; it warns about its own calls and leaves sockets open, which are closed under the test's filter."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    yield
    gc.collect()


@pytest.fixture
def visited(request: pytest.FixtureRequest, browser: Browser, address: str) -> Iterator[Visit]:
    with visit(browser, address, "app") as visit_of_app:
        visit_of_app.page.get_by_role("tab", name="Draw").wait_for()
        yield visit_of_app
        assert visit_of_app.fits()
    print(f"\n{request.node.name}:", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in visit_of_app.seconds.items()))


def shown(page: Page) -> Locator:
    """Return the content of the open tab."""
    return page.get_by_role("tabpanel").locator("visible=true").first


def tab(visited: Visit, name: str) -> Locator:
    """Open a tab and return its content."""
    visited.page.get_by_role("tab", name=name, exact=True).click()
    return shown(visited.page)


def button(where: Locator, name: str) -> Locator:
    return where.get_by_role("button", name=name, exact=True)


def gallery(where: Locator, number: int = 0) -> Locator:
    """Return the pictures of a tab's gallery."""
    return where.locator(".grid-container").nth(number).locator("img")


def warned(page: Page, message: str) -> None:
    """Wait for a toast with this message, then close all toasts: the next one may have the same message."""
    expect(page.get_by_text(message)).to_be_visible()
    page.evaluate("for (const close of document.querySelectorAll('[data-testid=toast-close]')) close.click()")
    expect(page.get_by_test_id("toast-text")).to_have_count(0)


def labelled(where: Locator, label: str) -> Locator:
    """Return the component with this label."""
    return where.locator(".block").filter(has=where.page.get_by_text(label, exact=True)).last


def pixels_of(image: Locator) -> np.ndarray:
    """Return the pixels of an image as the page received it."""
    content = httpx.get(image.get_attribute("src") or "", trust_env=False).content
    return np.asarray(Image.open(io.BytesIO(content)))


def put(where: Locator, path: Path, number: int = 0) -> None:
    where.locator('input[type="file"]').nth(number).set_input_files(path)


def choose(visited: Visit, where: Locator, label: str) -> None:
    where.get_by_role("combobox", name="Label").click()
    visited.page.get_by_role("option", name=label, exact=True).click()


def point(image: Locator, across: float, down: float) -> None:
    """Click at a relative position of a picture that fills the width or height of its frame."""
    box = image.bounding_box()
    natural = image.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert box is not None
    scale = min(box["width"] / natural[0], box["height"] / natural[1])
    x, y = (
        (box[side] - size * scale) / 2 + size * scale * share
        for side, size, share in zip(("width", "height"), natural, (across, down), strict=True)
    )
    image.click(position={"x": x, "y": y})


def painted_at(canvas: Locator) -> bool:
    """Return whether there is paint in the middle of a canvas; the tools at its sides include a red one."""
    pixels = np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")).astype(int)
    down, across = pixels.shape[0] // 2, pixels.shape[1] // 2
    middle = pixels[down - 4 : down + 4, across - 4 : across + 4]
    return bool((middle[..., 0] - middle[..., 1:].max(-1) > 150).any())


def shows(image: Locator, expected: Any) -> bool:
    """Return whether a picture becomes the expected one; texts beside it may appear earlier."""
    deadline = time.monotonic() + 60
    while not (equal := np.array_equal(pixels_of(image), np.asarray(expected))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return equal


@pytest.fixture
def picture(generator: Generator, tmp_path: Path) -> Path:
    """A file with an image of the run, larger than its images."""
    path = tmp_path / "given.png"
    drawn = generator.sample(1, label=1, seed=5)[0]
    drawn.resize((drawn.width * 3, drawn.height * 3)).save(path)
    return path


def test_draw_equals_the_command_line_and_sends_pictures_to_other_tabs(visited: Visit, generator: Generator, tmp_path: Path) -> None:
    panel = tab(visited, "Draw")
    visited.timed("draw 16", button(panel, "Draw").click, lambda: gallery(panel).nth(15).wait_for())
    visited.screenshot("draw")
    for field, value in (("Number", "3"), ("Seed", "4"), ("Temperature", "0.8"), ("Top-p", "0.9"), ("Guidance", "1.5")):
        labelled(panel, field).locator('input[type="number"]').fill(value)
    choose(visited, panel, generator.label_names[1])
    button(panel, "Draw").click()
    expect(gallery(panel)).to_have_count(3)
    expected = generator.sample(3, label=1, seed=4, temperature=0.8, top_p=0.9, guidance=1.5)
    for number, drawn in enumerate(expected):
        assert shows(gallery(panel).nth(number), drawn)
    line = labelled(panel, "The same on the command line").locator("textarea").input_value()
    assert line.endswith(f"--n=3 --seed=4 --label={generator.label_names[1]} --temperature=0.8 --top-p=0.9 --guidance=1.5")
    command = shlex.split(line.split("sample.py ")[1])
    copy = Path(shutil.copytree(generator.run.path, tmp_path / "run"))
    sample([*command, "--run", str(copy)])
    folder = max((copy / "samples").iterdir())
    for number, drawn in enumerate(expected):
        assert np.array_equal(np.asarray(Image.open(folder / f"images/{number:05d}.png")), np.asarray(drawn))

    button(panel, "Show its codes").click()
    warned(visited.page, "expected a selected sample")
    for name, target in (("Show its codes", "Codes"), ("Fill a part of it", "Fill"), ("Walk from it", "Walk"), ("Walk to it", "Walk")):
        panel = tab(visited, "Draw")
        gallery(panel).nth(1).click()
        button(panel, name).click()
        expect(visited.page.get_by_role("tab", name=target, exact=True)).to_have_attribute("aria-selected", "true")
        sent = shown(visited.page).locator("img").nth(1 if name == "Walk to it" else 0)
        expect(sent).to_be_visible()
        assert shows(sent, expected[1])


def test_codes_are_shown_and_replaced(visited: Visit, generator: Generator, picture: Path) -> None:
    panel = tab(visited, "Codes")
    code_map, rebuilt = panel.get_by_alt_text("codes"), labelled(panel, "From its codes").locator("img")
    visited.timed("look at codes", lambda: put(panel, picture), code_map.wait_for)
    codes = generator.encode(picture)
    expect(panel.get_by_text(f"{float(generator.surprisals(codes)[0].sum()):.1f} bits")).to_be_visible()
    assert shows(rebuilt, generator.decode(codes)[0])

    rows, columns = generator.tokenizer.grids[0]
    place, text = Place(0, rows - 1, 1), f"Row {rows}, column 2: code"
    visited.timed(
        "click a code",
        lambda: point(code_map, 1.5 / columns, (rows - 0.5) / rows),
        panel.get_by_text(f"{text} {place.of(codes)}").wait_for,
    )
    near = nearest_codes(generator.tokenizer, 0, place.of(codes), 8)
    likely = most_likely_codes(generator, codes, None, place, 8)
    captions = [panel.locator(".grid-container").nth(number).locator(".caption-label").all_inner_texts() for number in (0, 1)]
    assert [[int(caption.split(":")[0]) for caption in texts] for texts in captions] == [near, likely]
    visited.screenshot("codes")

    changed = replaced(codes, place, near[2])
    assert captions[0][2].endswith(f"all {float(generator.surprisals(changed)[0].sum()):.0f}")
    visited.timed("exchange it", gallery(panel, 0).nth(2).click, panel.get_by_text(f"{text} {near[2]}").wait_for)
    assert shows(rebuilt, generator.decode(changed)[0])
    second = most_likely_codes(generator, changed, None, place, 8)[1]
    gallery(panel, 1).nth(1).click()
    expect(panel.get_by_text(f"{text} {second}")).to_be_visible()
    expect(panel.get_by_text("Replaced: 2.")).to_be_visible()
    visited.timed("undo", button(panel, "Undo").click, panel.get_by_text("Replaced: 1.").wait_for)
    assert shows(rebuilt, generator.decode(changed)[0])
    button(panel, "Start over").click()
    expect(panel.get_by_text("Replaced")).to_have_count(0)
    assert shows(rebuilt, generator.decode(codes)[0])
    button(panel, "Undo").click()
    warned(visited.page, "expected a code that was replaced")

    choose(visited, panel, generator.label_names[0])
    expect(panel.get_by_text(f"{float(generator.surprisals(codes, 0)[0].sum()):.1f} bits")).to_be_visible()
    before = str(rebuilt.get_attribute("src"))  # read ahead of the click: the answer may come at once
    visited.timed("draw one", button(panel, "Draw one").click, lambda: expect(rebuilt).not_to_have_attribute("src", before))


def test_painted_parts_are_drawn_again(visited: Visit, generator: Generator, picture: Path) -> None:
    panel = tab(visited, "Fill")
    button(panel, "Fill").click()
    warned(visited.page, "picture: expected one, found none")
    put(panel, picture)
    assert shows(panel.locator("img").first, Image.open(picture))
    canvas, mouse = panel.locator("canvas").first, visited.page.mouse
    canvas.wait_for()
    button(panel, "Fill").click()
    warned(visited.page, "paint: expected some")
    for _ in range(30):  # the editor does not signal when it has loaded the picture
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        assert box is not None
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2  # the picture's middle, too
        for step in range(5):  # at the pace of a hand, as the editor expects
            mouse.move(x + step / 4, y)
            if step == 0:
                mouse.down()
            visited.page.wait_for_timeout(30)
        mouse.up()
        if painted_at(canvas):
            break
    for field, value in (("Number", "4"), ("Seed", "2")):
        labelled(panel, field).locator('input[type="number"]').fill(value)
    visited.timed("fill 4", button(panel, "Fill").click, lambda: gallery(panel).nth(3).wait_for())
    visited.screenshot("fill")
    filled = np.stack([pixels_of(gallery(panel).nth(number)) for number in range(4)])
    height, width, _ = generator.image_shape
    # Distance of each pixel's nearest point from the middle.
    y, x = (np.maximum(0, np.abs(np.arange(side) + 0.5 - side / 2) - 0.5) for side in (height, width))
    keep = np.hypot(y[:, None], x) >= BRUSH / -(-SIDE // max(height, width))
    assert np.array_equal(filled, np.stack([np.asarray(image) for image in generator.complete([picture] * 4, keep, seed=2)]))

    panel.get_by_role("button", name="Clear canvas").click()  # of its paint: the picture is there again
    deadline = time.monotonic() + 60
    while painted_at(canvas):
        assert time.monotonic() < deadline
    button(panel, "Fill").click()
    warned(visited.page, "paint: expected some")


def test_walks_equal_those_of_the_python_functions(visited: Visit, generator: Generator, picture: Path) -> None:
    panel = tab(visited, "Walk")
    button(panel, "Draw two").click()
    expect(panel.locator("img")).to_have_count(2)
    put(panel, picture, 1)
    assert shows(panel.locator("img").nth(1), Image.open(picture))
    labelled(panel, "Pictures, including both ends").locator('input[type="number"]').fill("9")
    visited.timed("walk 9", button(panel, "Walk").click, lambda: gallery(panel).nth(8).wait_for())
    visited.screenshot("walk")
    drawn = panel.locator("img").first
    first, last = generator.encode(pixels_of(drawn)), generator.encode(picture)
    for number, expected in enumerate(generator.decode(walk(generator.tokenizer, first, last, 9))):
        assert shows(gallery(panel).nth(number), expected)


def test_the_codebook_shows_the_neighbours_of_a_code(visited: Visit, generator: Generator) -> None:
    panel = tab(visited, "Codebook")
    sheet = panel.get_by_alt_text("codebook")
    visited.timed("show the codebook", button(panel, "Show").click, sheet.wait_for)
    shown_at = pixels_of(sheet).shape
    rows = -(-min(256, generator.tokenizer.quantizer.num_codes[0]) // 16)
    visited.timed("click a code", lambda: point(sheet, 2.5 / 16, 0.5 / rows), lambda: gallery(panel).nth(7).wait_for())
    visited.screenshot("codebook")
    captions = panel.locator(".grid-container .caption-label").all_inner_texts()
    assert [int(caption) for caption in captions] == [2, *nearest_codes(generator.tokenizer, 0, 2, 11)], shown_at


def test_every_tab_fits_and_works_on_a_phone(browser: Browser, address: str, picture: Path) -> None:
    with visit(browser, address, "app-phone", PHONE) as phone:
        for name, action, pictures in (("Draw", "Draw", 16), ("Codes", "Draw one", 1), ("Walk", "Draw two", 2), ("Codebook", "Show", 1)):
            panel = tab(phone, name)
            button(panel, action).tap()
            panel.locator("img").nth(pictures - 1).wait_for()
            phone.screenshot(name.lower())
            assert phone.fits(), name
        panel = tab(phone, "Fill")
        put(panel, picture)
        panel.locator("canvas").first.wait_for()
        assert phone.fits()


def test_invalid_or_too_large_pictures_get_a_message(browser: Browser, address: str, picture: Path, tmp_path: Path) -> None:
    text, bomb, large = tmp_path / "text.png", tmp_path / "bomb.png", tmp_path / "large.png"
    text.write_text("no picture")
    Image.new("L", (8000, 8000)).save(bomb)
    large.write_bytes(picture.read_bytes() + bytes(10 * 2**20))
    cases = ((text, "text.png: expected a picture (PNG,"), (bomb, "bomb.png: expected a picture (PNG,"), (large, "maximum"))
    with visit(browser, address, "app-refused") as app:
        panel = tab(app, "Codes")
        put(panel, picture)
        expect(panel.get_by_text("All codes cost")).to_be_visible()
        for path, message in cases:  # none is uploaded while another is on its way
            put(panel, path)
            warned(app.page, message)
            if path != large:  # which was not even uploaded
                expect(panel.get_by_text("All codes cost")).to_have_count(0)
            app.errors.clear()  # the console reports refused files too
            put(panel, picture)
            expect(panel.get_by_text("All codes cost")).to_be_visible()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("gradio_here")
def test_sampling_settings_of_the_recipe_are_used_beyond_the_ranges_of_the_fields(browser: Browser, run_copy: Path) -> None:
    """Guidance of the recipe is ignored for a prior that does not support it."""
    train_prior(["--run", str(run_copy), "--name", "insisting", "--stage2.condition_dropout", "0", "--stage2.steps", "2"])
    recipe = yaml.safe_load((run_copy / "recipe.yaml").read_text())
    recipe["sampling"] |= {"temperature": 2.5, "guidance": 7.5, "top_p": 0.005}
    (run_copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for prior, guidance in (("transformer", 7.5), ("insisting", 1.0)):
        generator = Generator.from_pretrained(run_copy, prior, "cpu")
        expected = generator.sample(16, guidance=guidance)
        with served(generator, "127.0.0.1", None) as address, visit(browser, address, "app-recipe") as app:
            panel = tab(app, "Draw")
            button(panel, "Draw").click()
            expect(gallery(panel)).to_have_count(16)
            drawn = [pixels_of(gallery(panel).nth(number)) for number in range(16)]
            assert all(np.array_equal(one, np.asarray(other)) for one, other in zip(drawn, expected, strict=True))
            gallery(panel).nth(2).click()
            button(panel, "Draw").click()  # drawing again resets the choice
            expect(panel.locator(".thumbnail-item.selected")).to_have_count(0)
            panel = tab(app, "Codes")
            button(panel, "Draw one").click()
            expect(panel.get_by_text("All codes cost")).to_be_visible()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("gradio_here")
def test_without_a_prior_codes_can_still_be_edited(browser: Browser, tiny_recipe: Path, picture: Path, tmp_path: Path) -> None:
    """With a tokenizer of two levels."""
    hierarchy = ["--tokenizer.network.kind", "hierarchical", "--tokenizer.network.downsampling", "2"]
    train_tokenizer(["--config", str(tiny_recipe), "--run", str(tmp_path / "run"), *hierarchy, "--stage1.steps", "2"])
    generator = Generator.from_pretrained(tmp_path / "run", device="cpu")
    with served(generator, "127.0.0.1", None) as address, visit(browser, address, "app-two-levels") as app:
        app.page.get_by_role("tab", name="Codes", exact=True).wait_for()
        assert app.page.get_by_role("tab").all_inner_texts() == ["Codes", "Walk", "Codebook"]
        panel = tab(app, "Codes")
        assert button(panel, "Draw one").count() == 0
        put(panel, picture)
        code_map = panel.get_by_alt_text("codes")
        code_map.wait_for()
        coarse = code_map.get_attribute("src") or ""
        panel.get_by_role("radio", name="2").click()
        expect(code_map).not_to_have_attribute("src", coarse)
        point(code_map, 5.5 / 6, 3.5 / 4)
        expect(panel.get_by_text("Row 4, column 6: code")).to_be_visible()
        expect(gallery(panel)).to_have_count(8)
        gallery(panel).nth(0).click()
        expect(panel.get_by_text("Replaced: 1.")).to_be_visible()
        panel = tab(app, "Codebook")
        panel.get_by_role("radio", name="2").click()
        panel.get_by_alt_text("codebook").wait_for()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prior", "best"], "--prior best: expected one of transformer"),
        (["--prior", "uniform"], "--prior: expected a learned prior, found uniform"),
        (["--port", "0"], "--port: expected 1 to 65535, found 0"),
        (["--port", "{taken}"], "expected an address that is free"),
        (["--host", "nowhere.invalid"], "expected an address that is free"),
    ],
)
def test_mistakes_get_one_line(arguments: list[str], message: str, run_copy: Path, one_line_error: Callable[..., str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        filled = [argument.format(taken=taken.getsockname()[1]) for argument in arguments]
        assert message in one_line_error(main, "--run", run_copy, *filled)


def test_several_processes_are_refused(run_copy: Path, one_line_error: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "expected to be started once, found 2 processes" in one_line_error(main, "--run", run_copy)


def test_without_the_extra_there_is_one_line(run_copy: Path, one_line_error: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        name for name in sys.modules if name.startswith("pipelines.playground.") and name.rpartition(".")[2] not in ("edits", "maps")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "expected the package gradio, found none; pip install -e '.[app]'" in one_line_error(main, "--run", run_copy)
