"""Tables and notes of an evaluation, as strings for Markdown and the HTML report."""

from __future__ import annotations

from typing import Any

from configs.markdown import markdown_table
from pipelines.evaluation.distances import PARTS
from stage1_vqvae.features.classifier import CLASSIFIER, ROTATION
from stage1_vqvae.features.networks import FID


def number(value: float | None, digits: int = 4) -> str:
    """Format a number to significant digits; a dash for None."""
    return "-" if value is None else f"{value:.{digits}g}"


def share(value: float | None) -> str:
    """Format a share in percent; a dash for None."""
    return "-" if value is None else f"{value:.1%}"


def spread(values: dict[str, float] | None, scale: float = 1) -> str:
    """Format mean and standard deviation; a dash for None."""
    return "-" if values is None else f"{scale * values['mean']:.3g} ± {scale * values['deviation']:.2g}"


def table(title: str, columns: list[str], rows: list[list[str]]) -> dict[str, Any]:
    """Build one table from its title, column names and rows of strings."""
    assert all(len(row) == len(columns) for row in rows)
    return {"title": title, "columns": columns, "rows": rows}


def tables(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Build all tables of an evaluation."""
    compared = [[name, str(value)] for name, value in results["compared"].items()]
    if results.get("sampling"):
        compared.append(["drawn with", ", ".join(f"{name} {value}" for name, value in results["sampling"].items())])
    result = [table("What was compared", ["", ""], compared), _reconstruction(results), _codes(results)]
    if "bound" in results:
        result.append(_bound(results))
    if "distances" in results:
        result += [_distances(results), _coverage(results)]
    if "beside_batch" in results:
        result.append(_beside_batch(results))
    if "memorisation" in results:
        result.append(_memorisation(results["memorisation"]))
    return result


def _reconstruction(results: dict[str, Any]) -> dict[str, Any]:
    names = {"mse": "MSE of [0, 1] pixels", "psnr": "PSNR in dB, mean over images", "ssim": "SSIM", "lpips": "LPIPS (AlexNet)"}
    values = results["reconstruction"]
    rows = []
    for key, name in names.items():
        mean_cells = ["-", "-"] if values[key] is None else [number(values[key]["mean"]), "{low:.4g} to {high:.4g}".format(**values[key])]
        rows.append([name, *mean_cells])
    rows.append(["PSNR in dB of the mean MSE", number(values["psnr_of_mean_mse"]), "-"])
    rows.append([f"{results['distance']} to the originals (rFD)", number(values["frechet"]), "-"])
    return table(f"Reconstructions of the {results['split']} images", ["", "mean", "95 % of bootstrap means"], rows)


def _codes(results: dict[str, Any]) -> dict[str, Any]:
    split = results["split"]
    rows = [[f"usage, {split}", share(results["codes"]["usage"])], [f"perplexity, {split}", number(results["codes"]["perplexity"])]]
    names = {"validation": "bits per token, prior, validation", "unigram": "bits per token, unigram, validation"}
    names |= {
        "uniform": "bits per token, uniform (log2 K)",
        "codes_bits_per_dim": "bits per dimension of the codes under the prior, validation",
    }
    likelihood = results.get("likelihood", {})
    at_most = {"validation", "codes_bits_per_dim"} if likelihood and not likelihood["exact"] else set()
    rows += [[name, ("at most " if key in at_most else "") + number(likelihood[key])] for key, name in names.items() if key in likelihood]
    return table("Codes", ["", ""], rows)


def _bound(results: dict[str, Any]) -> dict[str, Any]:
    bits = results["bound"]["bits_per_dimension"]
    names = {"uniform": "uniform", "unigram": "unigram (training frequencies)", "learned": f"prior {results['bound']['prior']}"}
    names["learned, given the class"] = f"{names['learned']}, given the class"
    pixel_bits = bits["pixels"]["mean"]
    rows = [
        [name, number(bits[key]["mean"]), f"{bits[key]['low']:.4g} to {bits[key]['high']:.4g}", number(bits[key]["mean"] - pixel_bits)]
        for key, name in names.items()
        if key in bits
    ]
    title = f"Bound on bits per dimension of the {results['split']} images: pixels given codes {number(pixel_bits)}, and codes under p(z)"
    return table(title, ["p(z)", "bits per dimension", "95 % of bootstrap means", "of which codes"], rows)


def _distances(results: dict[str, Any]) -> dict[str, Any]:
    scored = any(values["class_score"] is not None for values in results["distances"].values())
    columns = ["images", "N", results["distance"], f"of {PARTS} parts", f"{results['kernel_distance']} x 1000"]
    columns += [*([results["class_score"]] if scored else []), "in their class"]
    rows = []
    for name, values in results["distances"].items():
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
    return table(f"Distances to the {results['reference']} images", columns, rows)


def _coverage(results: dict[str, Any]) -> dict[str, Any]:
    keys, coverage = ("precision", "recall", "density", "coverage"), results["coverage"]
    rows = [[name, *("-" if values[key] is None else f"{values[key]:.3f}" for key in keys)] for name, values in coverage["sets"].items()]
    title = f"Neighbourhoods by {results['features']} features: N = {coverage['n']} of each set and of the {results['reference']} images"
    return table(title, ["images", *keys], rows)


def _beside_batch(results: dict[str, Any]) -> dict[str, Any]:
    spatial = "sFID" if results["distance"] == FID else "spatial Fréchet distance"
    columns = ["images", "N", results["distance"], spatial, results["class_score"], "precision", "recall", "in their class"]
    rows = []
    for name, values in results["beside_batch"].items():
        figures = [number(values[key]) for key in ("frechet", "spatial_frechet", "class_score")]
        shares = ["-" if values[key] is None else f"{values[key]:.4f}" for key in ("precision", "recall")]
        rows.append([name, str(values["n"]), *figures, *shares, share(values.get("in_their_class"))])
    return table(f"Beside {results['reference']}, by the definitions of ADM's evaluation", columns, rows)


def _memorisation(results: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for name, key in (("samples", "samples"), ("unseen real images", "held_out"), ("training images through the tokenizer", "copies")):
        values = results[key]
        figures = [number(values["median_distance"]), share(values["median_share_of_other_codes"])]
        rows.append([name, str(values["n"]), *figures, str(values["with_all_codes_of_a_training_image"])])
    columns = ["images", "N", "median feature distance", "median share of other codes", "with all its codes"]
    searched, count = results["training_images_by_features"], results["training_images"]
    among = "" if searched == count else f" (by features, of {searched:,} drawn at random of {count:,})"
    return table(f"The nearest training image of each{among}", columns, rows)


def notes(results: dict[str, Any]) -> list[str]:
    """Return notes on how to read the metrics."""
    lines = ["All metrics are of images rounded to 8 bits."]
    if results["reconstruction"]["lpips"] is None:
        lines.append("LPIPS: not computed; its network's weights are not in torch's cache, or images are below 32 pixels per side.")
    elif "lpips alex" in results["trained_by"]:
        lines.append("LPIPS: the tokenizer was trained to minimise this distance.")
    if "bound" in results:
        lines.append(
            "Bits per dimension are an upper bound of -log2 p(x): -log2 p(x|z) - log2 p(z), with the one z that the encoder chooses. Given "
            "the class, they bound -log2 p(x | class), which does not compare with unconditional likelihoods."
        )
    if "distances" in results:
        lines.append(
            "Fréchet distances fall with the number of images N: compare rows of equal N only. The parts are disjoint; their spread "
            "measures the uncertainty of the distance, their mean is that of a smaller N."
        )
        lines.append("Precision, recall, density and coverage depend on the number of images: compare results of equal N only.")
        if results.get("instead_of") is not None:
            lines.append(f"{results['instead_of']}.")
    if "beside_batch" in results:
        lines.append(
            "FID and sFID are usually published for 50,000 samples, equally many per class; fewer samples give higher ones. The inception "
            "score is the mean over consecutive parts of 5,000 images. Precision and recall: balls to the third neighbour (Kynkaanniemi et "
            "al. 2019) among all of these images, and among all images of the file: recall rises with N, compare rows of equal N only."
        )
        lines += results["batch_missing"]
    if "distances" in results or "beside_batch" in results:
        if results["distance"] != FID:
            lines.append(f"{results['distance']} is not FID: compare it only with distances of the same features.")
        if results["features"] in results["trained_by"]:
            trained_here = results["features"] in (CLASSIFIER, ROTATION)
            network = "a network trained in the same way, with other weights" if trained_here else "the same network"
            lines.append(
                f"The tokenizer was trained with features of {network}, which biases the distances in its favour. Compare other features "
                "too (--features)."
            )
    if "memorisation" not in results:
        lines.append("Samples: not evaluated; the run has no finished prior.")
    if "memorisation" in results and results["memorisation"]["ratio_of_median_distances"] is not None:
        ratio, copies_ratio = (results["memorisation"][name] for name in ("ratio_of_median_distances", "ratio_of_copies"))
        lines.append(
            f"Samples are {ratio:.2f} times as far from their nearest training image as unseen real images are; those of a prior "
            f"that memorised the training images would be {copies_ratio:.2f} times as far."
        )
    return lines


def markdown(results: dict[str, Any]) -> str:
    """Render an evaluation, with its tables and notes, as Markdown."""
    lines = [f"# Evaluation of {results['run']}"]
    for table in results["tables"]:
        lines += ["", f"## {table['title']}", "", *markdown_table(table["columns"], table["rows"])]
    return "\n".join([*lines, "", *(f"- {note}" for note in results["notes"]), ""])
