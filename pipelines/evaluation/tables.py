"""An evaluation as tables: the strings that Markdown and the HTML report show."""

from __future__ import annotations

from typing import Any

from configs.markdown import markdown_table
from pipelines.evaluation.distances import PARTS
from stage1_vqvae.features.classifier import CLASSIFIER, ROTATION
from stage1_vqvae.features.networks import FID


def number(value: float | None, digits: int = 4) -> str:
    """A number to significant digits; a dash for none."""
    return "-" if value is None else f"{value:.{digits}g}"


def share(value: float | None) -> str:
    """A share in per cent."""
    return "-" if value is None else f"{value:.1%}"


def spread(values: dict[str, float] | None, scale: float = 1) -> str:
    """Mean and deviation; a dash for none."""
    return "-" if values is None else f"{scale * values['mean']:.3g} ± {scale * values['deviation']:.2g}"


def table(title: str, columns: list[str], rows: list[list[str]]) -> dict[str, Any]:
    """One table: its title, the names of its columns, and rows of as many strings."""
    assert all(len(row) == len(columns) for row in rows)
    return {"title": title, "columns": columns, "rows": rows}


def tables(found: dict[str, Any]) -> list[dict[str, Any]]:
    """All tables of an evaluation's figures."""
    compared = [[name, str(value)] for name, value in found["compared"].items()]
    if found.get("sampling"):
        compared.append(["drawn with", ", ".join(f"{name} {value}" for name, value in found["sampling"].items())])
    result = [table("What was compared", ["", ""], compared), _reconstruction(found), _codes(found)]
    if "bound" in found:
        result.append(_bound(found))
    if "distances" in found:
        result += [_distances(found), _coverage(found)]
    if "beside_batch" in found:
        result.append(_beside_batch(found))
    if "memorisation" in found:
        result.append(_memorisation(found["memorisation"]))
    return result


def _reconstruction(found: dict[str, Any]) -> dict[str, Any]:
    names = {"mse": "MSE of [0, 1] pixels", "psnr": "PSNR in dB, mean over images", "ssim": "SSIM", "lpips": "LPIPS (AlexNet)"}
    values = found["reconstruction"]
    rows = []
    for key, name in names.items():
        of_mean = ["-", "-"] if values[key] is None else [number(values[key]["mean"]), "{low:.4g} to {high:.4g}".format(**values[key])]
        rows.append([name, *of_mean])
    rows.append(["PSNR in dB of the mean MSE", number(values["psnr_of_mean_mse"]), "-"])
    rows.append([f"{found['distance']} to the originals (rFD)", number(values["frechet"]), "-"])
    return table(f"Reconstructions of the {found['split']} images", ["", "mean", "95 % of bootstrap means"], rows)


def _codes(found: dict[str, Any]) -> dict[str, Any]:
    split = found["split"]
    rows = [[f"usage, {split}", share(found["codes"]["usage"])], [f"perplexity, {split}", number(found["codes"]["perplexity"])]]
    names = {"validation": "bits a token, prior, validation", "unigram": "bits a token, unigram, validation"}
    names |= {
        "uniform": "bits a token, uniform (log2 K)",
        "codes_bits_per_dim": "bits a dimension of the codes under the prior, validation",
    }
    likelihood = found.get("likelihood", {})
    at_most = {"validation", "codes_bits_per_dim"} if likelihood and not likelihood["exact"] else set()
    rows += [[name, ("at most " if key in at_most else "") + number(likelihood[key])] for key, name in names.items() if key in likelihood]
    return table("Codes", ["", ""], rows)


def _bound(found: dict[str, Any]) -> dict[str, Any]:
    bits = found["bound"]["bits_per_dimension"]
    names = {"uniform": "uniform", "unigram": "unigram (training frequencies)", "learned": f"prior {found['bound']['prior']}"}
    names["learned, given the class"] = f"{names['learned']}, given the class"
    of_pixels = bits["pixels"]["mean"]
    rows = [
        [name, number(bits[key]["mean"]), f"{bits[key]['low']:.4g} to {bits[key]['high']:.4g}", number(bits[key]["mean"] - of_pixels)]
        for key, name in names.items()
        if key in bits
    ]
    title = f"Bound on bits a dimension of the {found['split']} images: pixels given codes {number(of_pixels)}, and codes under p(z)"
    return table(title, ["p(z)", "bits a dimension", "95 % of bootstrap means", "of them codes"], rows)


def _distances(found: dict[str, Any]) -> dict[str, Any]:
    scored = any(values["class_score"] is not None for values in found["distances"].values())
    columns = ["images", "N", found["distance"], f"its {PARTS} parts", f"{found['kernel_distance']} x 1000"]
    columns += [*([found["class_score"]] if scored else []), "in their class"]
    rows = []
    for name, values in found["distances"].items():
        parts = values["frechet_of_parts"]
        rows.append(
            [
                name,
                str(values["n"]),
                number(values["frechet"]),
                "-" if parts is None else f"{spread(parts)} (N = {parts['n']})",
                spread(values["kernel"], 1000),
                *([spread(values["class_score"])] if scored else []),
                share(values.get("in_their_class")),
            ]
        )
    return table(f"Distances to the {found['reference']} images", columns, rows)


def _coverage(found: dict[str, Any]) -> dict[str, Any]:
    keys, coverage = ("precision", "recall", "density", "coverage"), found["coverage"]
    rows = [[name, *("-" if values[key] is None else f"{values[key]:.3f}" for key in keys)] for name, values in coverage["sets"].items()]
    title = f"Neighbourhoods by {found['features']} features: N = {coverage['n']} of each set and of the {found['reference']} images"
    return table(title, ["images", *keys], rows)


def _beside_batch(found: dict[str, Any]) -> dict[str, Any]:
    spatial = "sFID" if found["distance"] == FID else "spatial Fréchet distance"
    columns = ["images", "N", found["distance"], spatial, found["class_score"], "precision", "recall", "in their class"]
    rows = []
    for name, values in found["beside_batch"].items():
        figures = [number(values[key]) for key in ("frechet", "spatial_frechet", "class_score")]
        shares = ["-" if values[key] is None else f"{values[key]:.4f}" for key in ("precision", "recall")]
        rows.append([name, str(values["n"]), *figures, *shares, share(values.get("in_their_class"))])
    return table(f"Beside {found['reference']}, by the definitions of ADM's evaluation", columns, rows)


def _memorisation(found: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for name, key in (("samples", "samples"), ("unseen real images", "held_out"), ("training images through the tokenizer", "copies")):
        values = found[key]
        figures = [number(values["median_distance"]), share(values["median_share_of_other_codes"])]
        rows.append([name, str(values["n"]), *figures, str(values["with_all_codes_of_a_training_image"])])
    columns = ["images", "N", "median feature distance", "median share of other codes", "with all its codes"]
    kept, count = found["training_images_by_features"], found["training_images"]
    among = "" if kept == count else f" (by features, of {kept:,} drawn at random of {count:,})"
    return table(f"The nearest training image of each{among}", columns, rows)


def notes(found: dict[str, Any]) -> list[str]:
    """What must be said beside the figures."""
    said = ["All images were rounded to 8 bits before anything was computed."]
    if found["reconstruction"]["lpips"] is None:
        said.append("LPIPS: not computed; its network's weights are not in torch's cache, or images are below 32 pixels a side.")
    elif "lpips alex" in found["trained_by"]:
        said.append("LPIPS: the tokenizer was trained to lower this very distance.")
    if "bound" in found:
        said.append(
            "Bits a dimension are an upper bound of -log2 p(x): -log2 p(x|z) - log2 p(z), with the one z that the encoder chooses. What is "
            "given the class is p(x | class), and no likelihood of images alone."
        )
    if "distances" in found:
        said.append(
            "Fréchet distances fall with the number of images N: compare rows of equal N only. The parts are disjoint; their spread "
            "says how sure the distance is, their mean is that of a smaller N."
        )
        said.append(
            "Precision, recall, density and coverage rise and fall with the number of images: they compare with figures of the same N."
        )
        if found.get("instead_of") is not None:
            said.append(f"{found['instead_of']}.")
    if "beside_batch" in found:
        said.append(
            "FID and sFID are usually published for 50,000 samples, equally many per class; with fewer they are higher. The inception "
            "score is the mean over consecutive parts of 5,000 images. Precision and recall: balls to the third neighbour (Kynkaanniemi et "
            "al. 2019) among all of these images, and among all images of the file: recall rises with N, compare rows of equal N only."
        )
        said += found["batch_missing"]
    if "distances" in found or "beside_batch" in found:
        if found["distance"] != FID:
            said.append(f"{found['distance']} is not FID and compares with figures of the same features alone.")
        if found["features"] in found["trained_by"]:
            made_here = found["features"] in (CLASSIFIER, ROTATION)
            by = "a network made in the same way, if with other weights" if made_here else "this very network"
            said.append(f"The tokenizer was trained by the features of {by}: distances flatter it. Compare by others too (--features).")
    if "memorisation" not in found:
        said.append("Samples: not evaluated; the run has no finished prior.")
    if "memorisation" in found and found["memorisation"]["ratio_of_median_distances"] is not None:
        ratio, of_copies = (found["memorisation"][name] for name in ("ratio_of_median_distances", "ratio_of_copies"))
        said.append(
            f"Samples lie {ratio:.2f} times as far from their nearest training image as unseen real images do; those of a prior "
            f"that knows training images by heart would lie {of_copies:.2f} times as far."
        )
    return said


def markdown(found: dict[str, Any]) -> str:
    """The evaluation as Markdown; `found` has its tables and notes."""
    lines = [f"# Evaluation of {found['run']}"]
    for shown in found["tables"]:
        lines += ["", f"## {shown['title']}", "", *markdown_table(shown["columns"], shown["rows"])]
    return "\n".join([*lines, "", *(f"- {note}" for note in found["notes"]), ""])
