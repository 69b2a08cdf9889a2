"""Export a run to ONNX: encoder, decoder, one step of the prior, and a sampler in numpy that needs no torch.

    python pipelines/export_onnx.py --output DIR
    python pipelines/export_onnx.py --output DIR --precision float64
    python DIR/sample.py --n 64

Needs the extra `onnx` (pip install -e '.[onnx]'); what it writes needs onnxruntime and numpy alone. Graphs take any batch size. A
transformer's step has its keys and values among what goes in and comes out; of other priors the codes so far are the cache. Before it
ends it draws by both, and says how far they are apart. In float32 the prior takes half the memory; in float64, which onnxruntime has for
transformers alone, samples are those of pipelines/sample.py on a CPU, code by code.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from configs.cli import TRAIN_PRIOR, parse
from configs.errors import UserError, run_entry
from configs.run_dir import RunDir, new_folder, not_there_yet, program, write_json
from pipelines.generator import Generator
from stage1_vqvae.training.weights_file import fingerprint
from stage2_prior.priors.prior_file import finished_prior
from stage2_prior.priors.transformer import Transformer

_COMPARED = 10_000  # codes, at least


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    command = parse(__doc__, (), argv, options=_options)
    run, options = command.run, command.options
    output = not_there_yet("output", options.output)
    if options.precision not in ("float32", "float64"):
        raise UserError(f"--precision: expected float32 or float64, found {options.precision}")
    command.need_tokenizer()
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401, which torch needs for it

        from pipelines.exporting.graphs import export_prior, export_tokenizer
    except ModuleNotFoundError as error:
        raise UserError(f"expected the package {error.name}, found none; pip install -e '.[onnx]'") from None
    name = finished_prior(run, options.prior, command.next(TRAIN_PRIOR)).parent.name
    generator = Generator.from_pretrained(run.path, prior=name, device="cpu", precision=options.precision)
    prior, header = generator.prior, generator.header
    assert prior is not None
    assert header is not None
    if options.precision == "float64" and not isinstance(prior, Transformer):
        raise UserError(
            "--precision: expected float32, since onnxruntime has no convolutions in float64 that this prior needs, found float64"
        )
    with new_folder(output) as folder:
        export_tokenizer(generator.tokenizer, folder)
        cache = export_prior(prior, folder)
        sampling = dataclasses.asdict(generator.sampling)
        content = {
            "image_shape": generator.image_shape,
            "grids": header.grids,
            "num_codes": header.num_codes,
            "label_names": header.label_names,
            "knows_no_label": header.knows_no_label,
            "cache": cache,
            "dtype": options.precision,
            "sampling": {key: value for key, value in sampling.items() if key not in ("batch_size", "precision")},
            "tokenizer_sha256": fingerprint(run.tokenizer),
            "prior_sha256": generator.origin["prior_sha256"],
        }
        write_json(folder / "model.json", content)
        shutil.copyfile(Path(__file__).parent / "exporting" / "sampler.py", folder / "sample.py")
        said = compared(generator, folder)
    size = sum(path.stat().st_size for path in output.iterdir()) / 1e6
    run.record(program(), command.arguments, {"output": str(output), "prior": name, "precision": options.precision})
    print(f"wrote {RunDir.show(output)} ({size:.1f} MB): prior {name}; {said}")
    print(f"next: python {shlex.quote(RunDir.show(output / 'sample.py'))} --n 64")


def _options(parser: Any) -> None:
    parser.add_argument("--output", required=True, help="the folder to write; must not exist")
    parser.add_argument("--prior", type=str | None, help="name of a prior of the run (default: the last finished)")
    parser.add_argument("--precision", type=str, default="float32", help="of the prior: float32 or float64")


def compared(generator: Generator, folder: Path) -> str:
    """How far samples of the graphs are from torch's in float64, which are drawn for it; of 10,000 codes or more."""
    from pipelines.exporting.sampler import Sampler

    tokens = sum(h * w for h, w in generator.tokenizer.grids)
    count, sampler = -(-_COMPARED // tokens), Sampler(folder)
    exact = Generator.from_pretrained(generator.run.path, prior=generator.prior_name, device="cpu", precision="float64")
    expected, (codes, _) = exact.draw(count), sampler.sample(count)
    others = sum(int((level.numpy() != other).sum()) for level, other in zip(expected.codes, codes, strict=True))
    pixels = sampler.decode([level.numpy() for level in expected.codes])
    furthest = int(np.abs(pixels.astype(int) - expected.pixels.numpy()).max())
    why = " (a draw within float32's rounding of another code changes those after it)" if others else ""
    said = f"of {count * tokens:,} codes that were drawn, {others} differ from torch's in float64{why}"
    return f"{said}, no pixel of the same codes by more than {furthest}"


if __name__ == "__main__":
    run_entry(main)
