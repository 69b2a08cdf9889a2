"""Explore a run in a browser: draw, inspect and replace codes, fill parts, interpolate between pictures, show the codebook.

    python pipelines/app.py --run NAME
    python pipelines/app.py --run hf:USER/NAME --port 8080

Needs the extra `app` (pip install -e '.[app]'). Prints the address to open, on this machine alone (127.0.0.1); with `--host 0.0.0.0`
anyone who can connect to this machine may use it. The same seed gives the same pictures as pipelines/sample.py. Ctrl-C ends it.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from PIL import Image

from configs.cli import TRAIN_PRIOR, parse
from configs.errors import UserError, run_entry
from configs.run_dir import program
from pipelines.conditioning import need_classes
from pipelines.generator import Generator, command_sampling
from stage2_prior.priors.prior_file import finished_prior
from training.processes import start

# Limits of an uploaded picture.
_MAX_BYTES = 10 * 2**20
_MAX_PIXELS = 40_000_000
# Requests in the queue; more are refused.
_MAX_WAITING = 32


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    command = parse(__doc__, ("compute",), argv, options=_options)
    run, options, recipe = command.run, command.options, command.recipe
    if options.port is not None and not 0 < options.port < 65536:
        raise UserError(f"--port: expected 1 to 65535, found {options.port}")
    if options.prior is not None:
        finished_prior(run, options.prior, command.next(TRAIN_PRIOR))
    if (launched := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UserError(f"app: expected to be started once, found {launched} processes")
    _check_free(options.host, options.port)
    command.need_tokenizer()
    with tempfile.TemporaryDirectory(prefix="two-stage-app-") as folder:
        _prepare_gradio(options.host, folder)
        try:
            import pipelines.playground.page  # noqa: F401
        except ModuleNotFoundError as error:
            raise UserError(f"expected the package {error.name}, found none; pip install -e '.[app]'") from None
        device = start(recipe.compute).device
        generator = Generator.from_run(run, recipe.data, command_sampling(recipe, device), options.prior, device)
        need_classes(generator.header, "app")
        run.record(program(), command.arguments, {"prior": generator.prior_name, "host": options.host})
        # Pillow warns above this limit and refuses above twice the limit.
        Image.MAX_IMAGE_PIXELS = _MAX_PIXELS // 2
        with served(generator, options.host, options.port) as address:
            print(f"{generator}", f"open {address} (Ctrl-C ends it)", sep="\n", flush=True)
            with suppress(KeyboardInterrupt):
                threading.Event().wait()


@contextmanager
def served(generator: Generator, host: str, port: int | None) -> Iterator[str]:
    """Serve the app's page inside the block; yields its address. Errors: UserError for a port that is taken."""
    from pipelines.playground.page import CSS, build_page

    page = build_page(generator).queue(max_size=_MAX_WAITING)
    try:
        _, address, _ = page.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            max_file_size=_MAX_BYTES,
            css=CSS,
            footer_links=[],
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            run_history=False,
            ssr_mode=False,
        )
    except OSError as error:
        raise UserError(f"--port: expected one that is free, found: {error}") from None
    try:
        yield address
    finally:
        page.close(verbose=False)


def _prepare_gradio(host: str, folder: str) -> None:
    """Set gradio's upload folder and switch off its telemetry and proxies; must run before the import."""
    os.environ["GRADIO_TEMP_DIR"] = folder
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # also the check for a newer version
    for name in ("NO_PROXY", "no_proxy"):  # gradio sends a request to its own server
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "localhost", "127.0.0.1", host]))


def _options(parser: Any) -> None:
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address to listen on; 0.0.0.0 accepts other machines")
    parser.add_argument("--port", type=int | None, help="port to listen on (default: the first free one from 7860)")
    parser.add_argument("--prior", type=str, help="name of a prior of the run (default: the last finished)")


def _check_free(host: str, port: int | None) -> None:
    """Check the address. Errors: UserError if this machine does not have it or it is in use."""
    try:
        with socket.create_server((host, port or 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        where = f"--host {host}" + (f", --port {port}" if port else "")
        raise UserError(f"{where}: expected an address that is free, found: {error}") from None


if __name__ == "__main__":
    run_entry(main)
