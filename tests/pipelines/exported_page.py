"""Actions of tests on an exported page in a browser, and the results expected of it."""

from __future__ import annotations

import http.server
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from playwright.sync_api import Page

from configs.parts import part_from
from configs.run_dir import read_json, write_json
from configs.schema import Tokenizer
from pipelines.exporting.graphs import export_prior, export_tokenizer
from pipelines.exporting.sampler import Sampler, draw, uniforms, warp
from stage1_vqvae.model import VQVAE
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.priors.stepwise import StepwisePrior
from tests.browser import Visit
from tests.stage1_vqvae.quantizers.quantizer_kinds import D, part
from tests.stage2_prior.priors.prior_kinds import build

GRAPHS = ("encoder", "decoder", "prior")


def wait_for_line(page: Page, section: str, pattern: str) -> str:
    """Return the line of a section once it matches the pattern."""
    # Playwright polls every half second; an observer reports at once, as the timings need.
    return str(
        page.evaluate(
            """([section, pattern]) => new Promise((resolve, reject) => {
                const line = document.querySelector(`#${section} .line`);
                const look = () => new RegExp(pattern).test(line.textContent) && resolve(line.textContent);
                new MutationObserver(look).observe(line, { childList: true });
                setTimeout(() => reject(new Error(`expected ${pattern}, found ${line.textContent}`)), 60_000);
                look();
            })""",
            [section, pattern],
        )
    )


def opened(visited: Visit) -> Page:
    """Return the page once it has loaded and drawn its first pictures."""
    visited.page.emulate_media(reduced_motion="reduce")  # the mouse does not wait for scrolling
    wait_for_line(visited.page, "draw", "seconds")
    return visited.page


def press(visited: Visit, section: str, button: str, name: str | None = None) -> np.ndarray:
    """Press a button that draws. Returns the pictures then shown, uint8 (N, H, W, C)."""
    page = visited.page
    page.evaluate(f"document.querySelector('#{section} .line').textContent = ''")
    visited.timed(name or button, page.locator(f"[name={button}]").click, lambda: wait_for_line(page, section, r"picture.* seconds\.$"))
    return shown(page, section)


def shown(page: Page, section: str) -> np.ndarray:
    read = """images => Promise.all(images.map(async image => {
        await image.decode();
        const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
        const context = canvas.getContext("2d");
        context.drawImage(image, 0, 0);
        return [canvas.height, canvas.width, Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data)];
    }))"""
    pictures = page.locator(f"#{section} .pictures img").evaluate_all(read)
    return np.stack([np.array(values).reshape(height, width, 4)[..., :3] for height, width, values in pictures])


def share_equal(pictures: np.ndarray, expected: np.ndarray) -> float:
    """Return the share of pictures that are equal up to rounding of each pixel; grey ones are shown in three channels."""
    assert pictures.shape[:3] == expected.shape[:3]
    return float((np.abs(pictures.astype(int) - expected).max((1, 2, 3)) <= 1).mean())


def fill(page: Page, section: str = "draw", **fields: Any) -> None:
    for name, value in fields.items():
        field = page.locator(f"#{section} [name={name}]")
        field.select_option(str(value)) if name == "label" else field.fill(str(value))


def continued(sampler: Sampler, codes: np.ndarray, mask: np.ndarray, label: int | None, seed: int, count: int) -> np.ndarray:
    """Continuations by the numpy sampler, unguided: uint8 (N, H, W, C); codes (T,) are kept where mask (T,) is true."""
    numbers = np.full(count, label if label is not None else len(sampler.model["label_names"] or []))
    sequences = np.tile(np.where(mask, codes, 0), (count, 1))
    uniform = np.stack([uniforms(seed, number, len(codes)) for number in range(count)])
    for position, logits in enumerate(sampler.logits(numbers, sequences)):
        if not mask[position]:
            sequences[:, position] = draw(warp(logits, sampler.model["sampling"]), uniform[:, position])
    return sampler.decode(levels_of(sampler, sequences))


def levels_of(sampler: Sampler, sequences: np.ndarray) -> list[np.ndarray]:
    grids = sampler.model["grids"]
    levels = np.split(sequences, np.cumsum([h * w for h, w in grids])[:-1], 1)
    return [level.reshape(-1, *grid) for level, grid in zip(levels, grids, strict=True)]


def paint_below(page: Page, share: float) -> np.ndarray:
    """Paint the picture below a share of its height by mouse strokes. Returns the mask (H, W) of painted pixels."""
    page.locator("[name=brush]").fill("1")
    box, (height, width, _) = page.locator("canvas").bounding_box(), model_of(page)["image_shape"]
    assert box is not None
    for row in range(int(share * height), height):
        y = box["y"] + box["height"] * (row + 0.5) / height
        page.mouse.move(box["x"] + 1, y)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] - 1, y, steps=4)
        page.mouse.up()
    painted = np.zeros((height, width), bool)
    painted[int(share * height) :] = True
    return painted


def model_of(page: Page) -> dict[str, Any]:
    return dict(page.evaluate("fetch('model.json').then(answer => answer.json())"))


def unpainted_codes(model: dict[str, Any], painted: np.ndarray) -> np.ndarray:
    """Return the mask (T,) of codes that span no painted pixel."""
    height, width = painted.shape
    return np.concatenate([~painted.reshape(h, height // h, w, width // w).any((1, 3)).ravel() for h, w in model["grids"]])


def other_tokenizer(kind: str = "residual_shared", **fields: object) -> VQVAE:
    """Build a tokenizer of 8 x 12 pixels to 2 x 3 codes, on three levels for `residual_shared`."""
    torch.manual_seed(0)
    small = {"hidden_channels": 16, "residual_channels": 8, "residual_blocks": 1}
    network = part_from("tokenizer.network", small)
    return VQVAE(Tokenizer(code_dim=D, quantizer=part(kind, **fields), network=network), 8, 12, 3).eval().requires_grad_(False)


def other_prior() -> StepwisePrior:
    """Build a PixelCNN over the codes of `other_tokenizer`, with six labels."""
    tokenizer = other_tokenizer()
    layout = SequenceLayout(tokenizer.grids, tokenizer.quantizer.num_codes)
    return build("pixelcnn", layout, num_classes=6, layers=1).requires_grad_(False)


def export_other(folder: Path) -> None:
    """Write the graphs of `other_tokenizer` and `other_prior`, and other.json with the entries for their model.json."""
    prior = other_prior()
    export_tokenizer(other_tokenizer(), folder)
    cache = export_prior(prior, folder)
    about = {"image_shape": [8, 12, 3], "grids": prior.layout.grids, "num_codes": prior.layout.num_codes, "cache": cache}
    write_json(folder / "other.json", about)


def put_other(exported_other: Path, folder: Path) -> None:
    """Copy these graphs into a page's folder; its model then has no label names, and all samples have the first label."""
    model = {
        **read_json(folder / "model.json"),
        **read_json(exported_other / "other.json"),
        "label_names": None,
        "supports_unconditional": True,
    }
    for graph in GRAPHS:
        shutil.copy(exported_other / f"{graph}.onnx", folder)
        model["bytes"][f"{graph}.onnx"] = (folder / f"{graph}.onnx").stat().st_size
    model["sampling"].update(temperature=0.9, top_k=12, top_p=0.95, min_p=0.02)
    write_json(folder / "model.json", model)


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def hosted(folder: Path) -> Iterator[str]:
    """Yield the address of a plain HTTP server of a folder, without the headers that browsers require for threads."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
