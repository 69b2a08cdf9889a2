"""An exported page in a browser: it draws and completes as the numpy sampler does with the same graphs.

RUN=FOLDER selects another run; SCREENSHOTS=FOLDER saves screenshots, and -s prints how long actions took.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser

from configs.errors import UserError
from configs.run_dir import read_json, write_json
from pipelines import Generator
from pipelines.drawing import kept_codes
from pipelines.export_web import PAGE, main
from pipelines.exporting import vendored
from pipelines.exporting.sampler import Sampler, draw, uniforms, warp
from stage2_prior.train import main as train_prior
from tests.browser import PHONE, chromium, visit
from tests.conftest import check_names_no_place
from tests.pipelines.exported_page import (
    continued,
    fill,
    hosted,
    levels_of,
    opened,
    paint_below,
    press,
    put_other,
    share_equal,
    shown,
    unpainted_codes,
    wait_for_line,
)

# Required share of equal pictures, of at least 16 and of 3 to 5. A browser rounds float32 differently than numpy's onnxruntime, so
# that a draw may give another code and change those after it: about one of a real run's 49 codes.
SAME, SAME_OF_FEW = (0.9, 0.6) if "RUN" in os.environ else (1.0, 1.0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages from npm, fetched once for all tests; skips if there is no npm or no network."""
    folder = tmp_path_factory.mktemp("fetched") / "vendor"
    try:
        vendored.vendor(folder)
    except UserError as error:
        if shutil.which("npm") is not None and not re.search("ENOTFOUND|ECONNREFUSED|EAI_AGAIN|ETIMEDOUT|network", str(error)):
            raise
        pytest.skip(str(error))
    return folder


@pytest.fixture
def npm_packages(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vendored, "vendor", lambda folder: shutil.copytree(fetched, folder))


@pytest.fixture(scope="module")
def site(fetched: Path, exported: Path, exported_other: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server's folder with pages under `16` and `8`, and `other` with another prior over several levels, without labels."""
    folder = tmp_path_factory.mktemp("site")
    run = Path(shutil.copytree(exported / "run", folder.parent / "of the page" / "run"))

    def take(_: Generator, into: Path) -> dict[str, Any]:
        shutil.copytree(exported / "graphs", into, dirs_exist_ok=True)
        return dict(read_json(into / "model.json"))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(vendored, "vendor", lambda path: shutil.copytree(fetched, path))
        patched.setattr("pipelines.export_web.export_graphs", take)
        for bits in ("16", "8"):
            main(["--run", str(run), "--output", str(folder / bits), "--bits", bits])
    check_names_no_place(folder)
    (folder / "favicon.ico").touch()  # for pages without an icon
    model = read_json(folder / "8" / "model.json")
    model["sampling"]["guidance"] = 1.5  # as other recipes may say
    model["guidance_weights"] = np.linspace(0, 1, len(model["guidance_weights"])).tolist()
    write_json(folder / "8" / "model.json", model)
    put_other(exported_other, Path(shutil.copytree(folder / "16", folder / "other")))
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with hosted(site) as url:
        yield url


# ---- the sampler in JavaScript


def test_uniforms_and_draws_equal_pythons(browser: Browser, address: str) -> None:
    rng = np.random.default_rng(0)
    pairs = [(seed, number) for seed in (0, 1, -7, 2**53 - 1) for number in (0, 1, 1000)]
    logits = (rng.normal(size=(100, 9)) * 2).round(1)  # with ties
    options = [{}, {"temperature": 0.5, "top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3, "top_p": 0.9}, {"temperature": 0.0}]
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    uniform = rng.random(100)
    with visit(browser, f"{address}/16/vendor/", "sampler") as visited:  # a list of files, where nothing is drawn
        page = visited.page
        numbers = page.evaluate(
            "async asked => { const { uniforms } = await import('../sampler.js');"
            "return asked.map(([seed, number]) => Array.from(uniforms(seed, number, 700))) }",
            pairs,
        )
        assert np.array_equal(numbers, [uniforms(seed, number, 700) for seed, number in pairs])
        for settings in options:
            probabilities, drawn = page.evaluate(
                "async ([rows, uniform, settings]) => { const { warp, draw } = await import('../sampler.js');"
                "const warped = rows.map(row => warp(Float64Array.from(row), settings));"
                "return [warped.map(row => Array.from(row)), warped.map((row, i) => draw(row, uniform[i]))] }",
                [logits.tolist(), uniform.tolist(), {**plain, **settings}],
            )
            expected = warp(logits, {**plain, **settings})
            assert np.allclose(probabilities, expected, atol=1e-12)
            assert np.array_equal(drawn, draw(expected, uniform))


def test_a_patch_is_kept_if_none_of_it_is_painted(browser: Browser, address: str) -> None:
    rng = np.random.default_rng(0)
    with visit(browser, f"{address}/16/vendor/", "sampler") as visited:
        page = visited.page
        for grids in ([(2, 3)], [(1, 1), (2, 3), (8, 12)]):
            painted = rng.random((20, 8, 12)) < rng.uniform(0, 0.1, (20, 1, 1))
            masks = page.evaluate(
                "async ([model, masks]) => { const { keptCodes } = await import('../sampler.js');"
                "return masks.map(painted => keptCodes(model, painted)) }",
                [{"image_shape": [8, 12, 3], "grids": grids}, painted.reshape(20, -1).tolist()],
            )
            tokenizer: Any = SimpleNamespace(grids=grids)
            levels = [kept_codes(tokenizer, torch.from_numpy(~mask)) for mask in painted]
            assert np.array_equal(masks, [torch.cat([level.flatten() for level in one]).numpy() for one in levels])


# ---- drawing


@pytest.mark.parametrize("bits", [16, 8])
def test_the_page_draws_the_samplers_pictures(bits: int, browser: Browser, address: str, site: Path) -> None:
    sampler = Sampler(site / str(bits))
    names = sampler.model["label_names"]
    with visit(browser, f"{address}/{bits}/", f"page-{bits}") as visited:
        visited.timed("load and first 16", lambda: None, lambda: opened(visited))
        page = visited.page
        assert share_equal(shown(page, "draw"), sampler.sample(16)[1]) >= SAME
        if bits == 16:  # and mostly the pictures of torch, as documented
            torch_pictures = Generator.from_pretrained(site.parent / "of the page" / "run", device="cpu").sample(16, output="tensor")
            assert share_equal(shown(page, "draw"), torch_pictures.numpy()) >= 0.6
        for turn in range(5):
            press(visited, "draw", "draw", f"draw 16, {turn}")
        plain = {"temperature": 1, "guidance": 1}
        fill(page, number=20, seed=5, label=1, **plain)
        unguided = press(visited, "draw", "draw", "draw 20")
        assert share_equal(unguided, sampler.sample(20, names[1], 5, **plain)[1]) >= SAME
        fill(page, guidance=3, temperature=0.8)
        guided = press(visited, "draw", "draw", "draw 20, guided")
        assert share_equal(guided, sampler.sample(20, names[1], 5, guidance=3, temperature=0.8)[1]) >= SAME
        assert share_equal(guided, unguided) < 1
        command = page.locator(".command code").inner_text()
        assert command.endswith(f"--n=20 --seed=5 --temperature=0.8 --guidance=3 --label={names[1]}")
        fill(page, label="turns", temperature=0, number=3)
        following = press(visited, "draw", "another")
        assert page.locator("#draw [name=seed]").input_value() == "6"
        assert share_equal(following, sampler.sample(3, None, 6, guidance=3, temperature=0)[1]) >= SAME
        visited.screenshot("drawn")
        print(f"\n{bits} bits:", {name: round(seconds, 2) for name, seconds in visited.seconds.items()})


def test_a_prior_over_levels_without_labels_works_and_drawing_can_be_stopped(browser: Browser, address: str, site: Path) -> None:
    sampler = Sampler(site / "other")
    with visit(browser, f"{address}/other/", "other") as visited:
        page = opened(visited)
        assert share_equal(shown(page, "draw"), sampler.sample(16)[1]) == 1
        assert page.locator("[name=label]:visible, [name=guidance]:visible").count() == 0
        page.locator("#draw .pictures button").nth(2).click()
        painted = paint_below(page, 0.5)
        fill(page, "redraw", number=4)
        codes = np.concatenate([level.reshape(16, -1) for level in sampler.sample(16)[0]], 1)[2]
        mask = unpainted_codes(sampler.model, painted)
        assert 0 < mask.sum() < len(mask)
        completed = press(visited, "redraw", "redraw")
        assert share_equal(completed, continued(sampler, codes, mask, None, 0, 4)) == 1
        visited.screenshot("completed")
        fill(page, number=64)
        page.evaluate("document.querySelector('[name=draw]').click(); document.querySelector('#draw [name=stop]').click()")
        assert wait_for_line(page, "draw", "Stopped") == "Stopped."
        assert page.locator("#draw .pictures *").count() < 64
        fill(page, number=2)
        assert len(press(visited, "draw", "draw")) == 2


# ---- completion


def test_painted_parts_are_drawn_again_and_the_rest_is_kept(browser: Browser, address: str, site: Path, tmp_path: Path) -> None:
    sampler = Sampler(site / "16")
    height, width, channels = sampler.model["image_shape"]
    with visit(browser, f"{address}/16/", "completion") as visited:
        page = opened(visited)
        fill(page, guidance=1, temperature=sampler.model["sampling"]["temperature"])
        drawn = press(visited, "draw", "draw")
        codes = np.concatenate([level.reshape(16, -1) for level in sampler.sample(16, guidance=1)[0]], 1)
        page.locator("#draw .pictures button").nth(3).click()
        mask = unpainted_codes(sampler.model, paint_below(page, 0.5))
        assert 0 < mask.sum() < len(mask)
        fill(page, "redraw", number=5)
        completed = press(visited, "redraw", "redraw", "5 continuations")
        label = 3 % len(sampler.model["label_names"])
        assert share_equal(completed, continued(sampler, codes[3], mask, label, 0, 5)) >= SAME_OF_FEW
        assert share_equal(completed, continued(sampler, codes[3], mask, None, 0, 5)) < 1
        assert share_equal(completed, np.repeat(drawn[3:4], 5, 0)) < 1
        visited.screenshot("completed")
        # The next picture to complete has no paint yet.
        page.locator("#redraw .pictures button").nth(1).click()
        page.locator("[name=clear]").click()
        page.locator("[name=redraw]").click()
        assert "Paint: expected some" in wait_for_line(page, "redraw", "Paint")
        # A file of the run's size, which needs no scaling.
        pixels = sampler.sample(1, seed=9)[1][0]
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(tmp_path / "own.png")
        encoder = onnxruntime.InferenceSession(site / "16" / "encoder.onnx")
        levels = encoder.run(None, {"images": (pixels.transpose(2, 0, 1)[None] / np.float32(127.5) - 1).astype(np.float32)})
        file_codes = np.concatenate([level.reshape(-1) for level in levels])
        visited.timed(
            "open a file",
            lambda: page.locator("[name=file]").set_input_files(tmp_path / "own.png"),
            lambda: wait_for_line(page, "redraw", "as reconstructed by the model"),
        )
        page.locator("[name=half]").click()
        fill(page, seed=4)
        fill(page, "redraw", number=3, label="none")
        lower = np.repeat(np.arange(height) >= height // 2, width).reshape(height, width)
        expected = continued(sampler, file_codes, unpainted_codes(sampler.model, lower), None, 4, 3)
        assert share_equal(press(visited, "redraw", "redraw", "3 of a file"), expected) >= SAME_OF_FEW
        with page.expect_download() as download:
            page.locator("[name=save]").click()
        saved = np.array(Image.open(download.value.path()).convert("RGB"))
        assert share_equal(saved[None], sampler.decode(levels_of(sampler, file_codes[None]))) == 1
        print("\ncompletion:", {name: round(seconds, 2) for name, seconds in visited.seconds.items()})


def test_files_are_scaled_and_cropped_at_the_centre(browser: Browser, address: str, site: Path) -> None:
    """A picture that is white only in the middle becomes white; so does a transparent one, over a white background."""
    model = read_json(site / "16" / "model.json")
    height, width, channels = model["image_shape"]
    assert model["background"] == "white"
    wide = np.zeros((50 * height, 150 * width), np.uint8)
    wide[:, 50 * width : 100 * width] = 255
    tall = np.zeros((150 * height, 50 * width), np.uint8)
    tall[50 * height : 100 * height] = 255
    clear = np.zeros((50 * height, 50 * width, 4), np.uint8)
    encoder, sampler = onnxruntime.InferenceSession(site / "16" / "encoder.onnx"), Sampler(site / "16")
    white, black = (
        sampler.decode(encoder.run(None, {"images": np.full((1, channels, height, width), value, np.float32)})) for value in (1, -1)
    )
    assert share_equal(white, black) == 0
    with visit(browser, f"{address}/16/", "files") as visited:
        page = opened(visited)
        for picture in (wide, tall, clear):
            content = io.BytesIO()
            Image.fromarray(picture).save(content, "PNG")
            page.locator("[name=file]").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": content.getvalue()})
            wait_for_line(page, "redraw", "a.png, as reconstructed by the model")
            with page.expect_download() as download:
                page.locator("[name=save]").click()
            assert share_equal(np.array(Image.open(download.value.path()).convert("RGB"))[None], white) == 1
            page.evaluate("document.querySelector('#redraw .line').textContent = ''")
        page.locator("[name=file]").set_input_files({"name": "b.png", "mimeType": "image/png", "buffer": b"no picture"})
        assert wait_for_line(page, "redraw", "b.png") == "b.png: expected a picture that this browser can read, found something else."


# ---- errors, small screens, requests to hosts


def test_bad_values_get_a_line_and_keys_press_buttons(browser: Browser, address: str) -> None:
    with visit(browser, f"{address}/16/", "mistakes") as visited:
        page = opened(visited)
        before = shown(page, "draw")
        for name, value, line in (
            ("number", "0", "Number: expected a whole number from 1 to 64, found 0."),
            ("number", "2.5", "Number: expected a whole number from 1 to 64, found 2.5."),
            ("seed", "", "Seed: expected a whole number, found none."),
            ("seed", "9007199254740992", "Seed: expected a whole number up to 9007199254740991, found 9007199254740992."),
            ("temperature", "-1", "Temperature: expected a number of at least 0, found -1."),
            ("guidance", "", "Guidance: expected a number, found none."),
        ):
            field = page.locator(f"#draw [name={name}]")
            good = field.input_value()
            field.fill(value)
            page.locator("[name=draw]").click()
            assert wait_for_line(page, "draw", name.capitalize()) == line
            field.fill(good)
        assert np.array_equal(shown(page, "draw"), before)
        fill(page, "redraw", number=100)
        page.locator("[name=redraw]").click()
        assert wait_for_line(page, "redraw", "Continuations") == "Continuations: expected a whole number from 1 to 64, found 100."
        page.locator("[name=another]").focus()
        for seed in ("1", "2"):  # the focus stays for a second press
            page.evaluate("document.querySelector('#draw .line').textContent = ''")
            page.keyboard.press("Enter")
            wait_for_line(page, "draw", "seconds")
            assert page.locator("#draw [name=seed]").input_value() == seed


def test_the_page_works_by_touch_on_a_phone(browser: Browser, address: str) -> None:
    with visit(browser, f"{address}/16/", "phone", PHONE) as visited:
        page = opened(visited)
        page.emulate_media(color_scheme="dark")
        page.locator("#draw .pictures button").first.tap()
        canvas = page.locator("canvas")
        canvas.scroll_into_view_if_needed()
        box, scrolled = canvas.bounding_box(), page.evaluate("scrollY")
        assert box is not None
        touch = page.context.new_cdp_session(page)
        x, top, bottom = box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.2, box["y"] + box["height"] * 0.8
        for kind, points in (("touchStart", [top]), ("touchMove", [bottom]), ("touchMove", [bottom]), ("touchEnd", [])):
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y} for y in points]})
        assert page.evaluate("scrollY") == scrolled  # a finger paints, and does not scroll
        assert len(press(visited, "redraw", "redraw")) == 6
        page.locator("summary").tap()
        # Even with long names of classes.
        page.evaluate("for (const span of document.querySelectorAll('.pictures span')) span.textContent = 'n02113799'.repeat(9)")
        assert visited.fits()
        small = "elements => elements.filter(one => one.checkVisibility() && one.getBoundingClientRect().height < 32).map(one => one.name)"
        assert page.locator("button, select, input:not([type=file])").evaluate_all(small) == []
        visited.screenshot("dark")


def test_failed_downloads_get_a_line_and_can_be_retried(browser: Browser, address: str, site: Path) -> None:
    broken = Path(shutil.copytree(site / "16", site / "broken"))
    (broken / "prior.onnx").rename(broken / "elsewhere")
    page = browser.new_page()
    page.goto(f"{address}/broken/")
    assert "prior.onnx: expected a file, found none (404)." in wait_for_line(page, "draw", "prior.onnx")
    (broken / "elsewhere").rename(broken / "prior.onnx")
    page.locator("[name=draw]").click()
    wait_for_line(page, "draw", "seconds")
    page.close()
    (broken / "vendor/onnxruntime-web/ort.js").unlink()
    page = browser.new_page()
    page.goto(f"{address}/broken/")
    for _ in range(2):
        assert "This page cannot compute" in wait_for_line(page, "draw", "cannot compute")
        page.evaluate("document.querySelector('#draw .line').textContent = ''")
        page.locator("[name=draw]").click()
    page.close()


def test_the_page_reports_the_cost_of_rounding(browser: Browser, address: str, site: Path) -> None:
    loss = {bits: read_json(site / bits / "model.json")["loss"] for bits in ("16", "8")}
    assert 0 <= loss["16"]["pixels_differ_on_average"] < loss["8"]["pixels_differ_on_average"]
    # An estimate of a divergence, which is not negative.
    assert all(
        abs(bits_loss["excess_bits"]) < 0.05 and bits_loss["excess_bits"] > -4 * bits_loss["excess_bits_error"]
        for bits_loss in loss.values()
    )
    with visit(browser, f"{address}/8/", "about") as visited:
        page = opened(visited)
        page.locator("summary").click()
        text = page.locator("dl").inner_text()
        figures = loss["8"]
        measured = figures["excess_bits"] > 2 * figures["excess_bits_error"]
        assert ("additional bits per code" if measured else "no measurable additional bits") in text
        assert f"{figures['pictures_that_differ']} of {figures['pictures']} pictures differ from those" in text
        assert f"by at most {loss['8']['pixels_differ_at_most']} of 255" in text


def test_neither_the_page_nor_its_worker_can_reach_another_host(browser: Browser, address: str) -> None:
    # The same server by another name is another host. Each refusal is an error on the console, so this is not a `visit`.
    other = address.replace("127.0.0.1", "localhost")
    request = "url => fetch(url, { mode: 'no-cors' }).then(() => 'answered', () => 'refused')"
    page = browser.new_page()
    page.goto(f"{address}/16/")
    wait_for_line(page, "draw", "seconds")
    for place in (page, page.workers[0]):
        assert place.evaluate(request, f"{address}/16/model.json") == "answered"
        assert place.evaluate(request, f"{other}/16/model.json") == "refused"
    page.close()


def test_served_files_use_relative_paths_and_are_small(site: Path) -> None:
    sources = [path for path in PAGE.iterdir() if path.suffix in (".html", ".css", ".js")]
    assert {path.name for path in sources} <= {path.name for path in (site / "16").iterdir()}
    for path in sources:
        assert not re.search(r"https?://|\son\w+=|(src|href)=\"/", path.read_text()), path
    size = {bits: sum(path.stat().st_size for path in (site / bits).rglob("*") if path.is_file()) for bits in ("16", "8")}
    print({bits: f"{number / 1e6:.1f} MB" for bits, number in size.items()})
    assert size["8"] < size["16"] < 25e6


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: output"),
        (["--output", "{run}"], "expected a folder that does not exist yet, found one"),
        (["--output", "{run}/new", "--bits", "12"], "--bits: expected 16 or 8, found 12"),
        (["--output", "{run}/new", "--prior", "best"], "--prior best: expected one of transformer"),
        (["--output", "{run}/new", "--prior", "uniform"], "--prior: expected a learned prior, found uniform"),
    ],
)
def test_mistakes_get_one_line(arguments: list[str], message: str, run_copy: Path, one_line_error: Callable[..., str]) -> None:
    assert message in one_line_error(main, "--run", run_copy, *[argument.format(run=run_copy) for argument in arguments])
    assert not (run_copy / "new").exists()


def test_without_npm_there_is_one_line_and_no_folder(
    run_copy: Path, one_line_error: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    arguments = ["--run", run_copy, "--output", tmp_path / "made" / "page"]
    assert "expected npm (it comes with Node.js), found none" in one_line_error(main, *arguments)
    npm = tmp_path / "empty" / "npm"
    npm.parent.mkdir()
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\necho 'npm error network asked nobody' >&2\nexit 1\n")
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    assert "npm pack onnxruntime-web@" in (line := one_line_error(main, *arguments))
    assert "network asked nobody" in line
    # A package with another checksum is refused under any name.
    npm.write_text('#!/bin/sh\nfor folder; do :; done\necho other > "$folder/other.tgz"\n')
    assert "expected sha512" in one_line_error(main, *arguments)
    assert list((tmp_path / "made").iterdir()) == []


def test_without_the_extra_there_is_one_line(run_copy: Path, one_line_error: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    line = one_line_error(main, "--run", run_copy, "--output", run_copy / "new")
    assert "expected the package onnxruntime, found none; pip install" in line


@pytest.mark.usefixtures("npm_packages")
def test_guidance_is_switched_off_for_priors_that_do_not_support_it(run_copy: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def take(_: object, folder: Path) -> list[int]:  # graphs of another run, since they are not used
        for name in ("encoder", "decoder", "prior"):
            shutil.copy(site / "16" / f"{name}.onnx", folder)
        return list(read_json(site / "16/model.json")["cache"])

    monkeypatch.setattr("pipelines.exporting.folder.export_tokenizer", take)
    monkeypatch.setattr("pipelines.exporting.folder.export_prior", take)
    train_prior(["--run", str(run_copy), "--name", "insisting", "--stage2.condition_dropout", "0", "--stage2.steps", "2"])
    recipe = (run_copy / "recipe.yaml").read_text()
    (run_copy / "recipe.yaml").write_text(recipe.replace("guidance: 1.0", "guidance: 1.3"))
    assert "guidance: 1.3" in (run_copy / "recipe.yaml").read_text()
    main(["--run", str(run_copy), "--output", str(run_copy / "page")])
    assert read_json(run_copy / "page/model.json")["sampling"]["guidance"] == 1


@pytest.mark.usefixtures("npm_packages")
def test_a_failure_leaves_no_folder(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.export_web.export_graphs", lambda *arguments: json.loads("no graphs"))
    with pytest.raises(json.JSONDecodeError):
        main(["--run", str(run_copy), "--output", str(run_copy / "made" / "page")])
    assert list((run_copy / "made").iterdir()) == []
