"""Export a run as a web page that samples in the browser: static files for any host, which make no requests to other hosts.

    python pipelines/export_web.py --output DIR
    python pipelines/export_web.py --output DIR --bits 8
    python -m http.server --directory DIR

The page takes label, number, seed, temperature and guidance, draws with the same uniforms as pipelines/sample.py, and redraws painted parts
of its samples or of a file. Needs the extra `onnx` (pip install -e '.[onnx]') and npm, which downloads onnxruntime's web build. Weights are
rounded to half floats (--bits 16) or to bytes with a scale per output (--bits 8). The loss from rounding is printed and shown on the page:
additional bits per code, samples that differ, differences of pixels.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

import shlex
import shutil
from pathlib import Path
from typing import Any

from configs.cli import TRAIN_PRIOR, parse
from configs.errors import UserError, run_entry
from configs.run_dir import COMMANDS, RunDir, new_folder, program, unused_path, write_json
from pipelines.exporting.folder import (
    drift,
    encoder_disagreement,
    exact_generator,
    excess_bits,
    export_graphs,
    exportable_prior,
    need_packages,
)
from pipelines.generator import Generator
from stage2_prior.priors.prior_file import finished_prior

PAGE = Path(__file__).parent / "exporting" / "page"
"""Static files of the page."""
_GRAPHS = ("encoder.onnx", "decoder.onnx", "prior.onnx")


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    command = parse(__doc__, (), argv, options=_options)
    run, options = command.run, command.options
    output = unused_path("output", options.output)
    if options.bits not in (8, 16):
        raise UserError(f"--bits: expected 16 or 8, found {options.bits}")
    command.need_tokenizer()
    need_packages()
    name = finished_prior(run, options.prior, command.next(TRAIN_PRIOR)).parent.name
    generator = Generator.from_pretrained(run.path, prior=name, device="cpu", precision="float32")
    exportable_prior(generator)  # before npm downloads anything
    with new_folder(output) as folder:
        loss = write_page(generator, folder, options.bits)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e6
    run.record(program(), command.arguments, {"output": str(output), "prior": name, "bits": options.bits})
    print(f"wrote {RunDir.show(output)} ({size:.1f} MB): prior {name}, weights of {options.bits} bits")
    print(
        f"loss: {loss['excess_bits']:.5f} +- {loss['excess_bits_error']:.5f} of {loss['bits']:.2f} bits per code; from the same seed "
        f"{loss['pictures_that_differ']} of {loss['pictures']} pictures differ from torch's in float64, {loss['codes_that_differ']:,} of "
        f"{loss['codes']:,} codes; of codes of opened pictures {loss['encoded_differ']:.1%} differ; pixels of the same codes differ by at "
        f"most {loss['pixels_differ_at_most']} of 255, on average by {loss['pixels_differ_on_average']:.3f}"
    )
    print(f"next: python -m http.server --directory {shlex.quote(RunDir.show(output))}  # then open http://127.0.0.1:8000")


def _options(parser: Any) -> None:
    parser.add_argument("--output", required=True, help="folder to write; must not exist")
    parser.add_argument("--prior", type=str, help="name of a prior of the run (default: the last finished)")
    parser.add_argument("--bits", type=int, default=16, help="bits per weight in the files: 16 or 8")


def write_page(generator: Generator, folder: Path, bits: int) -> dict[str, Any]:
    """Write the page of a generator with a prior, on the CPU and in float32, into an empty folder.

    Returns the loss from rounding weights to `bits`, as in model.json. Errors: UserError if npm downloads nothing.
    """
    from pipelines.exporting.vendored import vendor
    from pipelines.exporting.weights import round_weights

    vendor(folder / "vendor")
    for path in PAGE.iterdir():
        shutil.copyfile(path, folder / path.name)
    content = export_graphs(generator, folder)
    for graph in _GRAPHS:
        round_weights(folder / graph, bits)
    write_json(folder / "model.json", content)  # which the sampler reads
    loss = _loss(exact_generator(generator), folder)
    loaded = [*_GRAPHS, "vendor/onnxruntime-web/ort.wasm"]
    details = {
        "run": generator.run.path.resolve().name,
        "command": f"two-stage-{COMMANDS['pipelines/sample.py']}",  # the installed command, without this machine's paths
        "prior": generator.prior_name,
        "bits": bits,
        "background": generator.data.background,
        "crop": generator.data.transform.crop()._asdict(),
        "bytes": {name: (folder / name).stat().st_size for name in loaded},
        "loss": loss,
    }
    write_json(folder / "model.json", {**content, **details})
    return loss


def _loss(exact: Generator, folder: Path) -> dict[str, Any]:
    excess, difference = excess_bits(exact, folder), drift(exact, folder)
    return {
        "bits": excess.bits,
        "excess_bits": excess.excess,
        "excess_bits_error": excess.error,
        "codes": difference.codes,
        "codes_that_differ": difference.changed_codes,
        "pictures": difference.images,
        "pictures_that_differ": difference.changed_images,
        "encoded_differ": encoder_disagreement(exact, folder),
        "pixels_differ_at_most": difference.max_difference,
        "pixels_differ_on_average": difference.mean_difference,
    }


if __name__ == "__main__":
    run_entry(main)
