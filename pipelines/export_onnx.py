"""Export a run to ONNX: encoder, decoder, one step of the prior, and a sampler in numpy without torch.

    python pipelines/export_onnx.py --output DIR
    python pipelines/export_onnx.py --output DIR --precision float64
    python DIR/sample.py --n 64

Needs the extra `onnx` (pip install -e '.[onnx]'); the exported folder needs only onnxruntime and numpy. Graphs take any batch size. A
transformer's step takes and returns its keys and values; other priors take the codes so far instead. Finally, samples of both samplers are
compared, and their differences printed. In float32 the prior takes half the memory; in float64, which onnxruntime supports for
transformers only, samples have the same codes as those of pipelines/sample.py on a CPU.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

import shlex
import shutil
from pathlib import Path
from typing import Any

from configs.cli import TRAIN_PRIOR, parse
from configs.errors import UserError, run_entry
from configs.run_dir import RunDir, new_folder, program, unused_path, write_json
from pipelines.exporting.folder import drift, exact_generator, export_graphs, need_packages
from pipelines.generator import Generator
from stage2_prior.priors.prior_file import finished_prior
from stage2_prior.priors.transformer import Transformer


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    command = parse(__doc__, (), argv, options=_options)
    run, options = command.run, command.options
    output = unused_path("output", options.output)
    if options.precision not in ("float32", "float64"):
        raise UserError(f"--precision: expected float32 or float64, found {options.precision}")
    command.need_tokenizer()
    need_packages()
    name = finished_prior(run, options.prior, command.next(TRAIN_PRIOR)).parent.name
    generator = Generator.from_pretrained(run.path, prior=name, device="cpu", precision=options.precision)
    if options.precision == "float64" and not isinstance(generator.prior, Transformer):
        raise UserError(
            "--precision: expected float32, since onnxruntime has no convolutions in float64 that this prior needs, found float64"
        )
    with new_folder(output) as folder:
        write_json(folder / "model.json", export_graphs(generator, folder))
        shutil.copyfile(Path(__file__).parent / "exporting" / "sampler.py", folder / "sample.py")
        difference = drift(exact_generator(generator), folder)
    size = sum(path.stat().st_size for path in output.iterdir()) / 1e6
    run.record(program(), command.arguments, {"output": str(output), "prior": name, "precision": options.precision})
    reason = " (a draw within float32's rounding of another code changes those after it)" if difference.changed_codes else ""
    differing = f"of {difference.codes:,} codes drawn, {difference.changed_codes} differ from torch's in float64{reason}"
    pixels = f"pixels of the same codes by at most {difference.max_difference}"
    print(f"wrote {RunDir.show(output)} ({size:.1f} MB): prior {name}; {differing}, {pixels}")
    print(f"next: python {shlex.quote(RunDir.show(output / 'sample.py'))} --n 64")


def _options(parser: Any) -> None:
    parser.add_argument("--output", required=True, help="folder to write; must not exist")
    parser.add_argument("--prior", type=str, help="name of a prior of the run (default: the last finished)")
    parser.add_argument("--precision", type=str, default="float32", help="precision of the prior: float32 or float64")


if __name__ == "__main__":
    run_entry(main)
