"""Third-party files of the page from npm packages, downloaded by the user's npm: onnxruntime's web build, and BLAKE2b.

The version and sha512 of each package are pinned, so that the page serves what was tested.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from configs.run_dir import write_bytes


@dataclass(frozen=True)
class Package:
    """An npm package, and its files that are copied, with their new names."""

    name: str
    version: str
    sha512: str
    """Hash of its tarball, base64."""
    folder: str
    files: dict[str, str]


PACKAGES = (
    Package(
        "onnxruntime-web",
        "1.30.0",
        "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
        "onnxruntime-web",
        # As .js: some servers do not declare an .mjs as a script, and browsers refuse it then.
        {"dist/ort.wasm.bundle.min.mjs": "ort.js", "dist/ort-wasm-simd-threaded.wasm": "ort.wasm"},
    ),
    Package(
        "@noble/hashes",
        "2.4.0",
        "X5XaVWZIBCT7HHZGm5I7ZQXDwLG+bGXuSrMQAW+7Zvl87h1kmc1ZB1VSRJcpUfoUrGQp4Fkoxm5kZ+Ms+aW+eA==",
        "noble-hashes",
        {name: name for name in ("LICENSE", "blake2.js", "_blake.js", "_md.js", "_u64.js", "utils.js")},
    ),
)


def vendor(folder: Path) -> None:
    """Write the files of all packages into a new folder, one folder per package, with their licences.

    Errors: UserError without npm, without network, or for a package that differs from the pinned one.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("expected npm (it comes with Node.js), found none")
    for package in PACKAGES:
        with tempfile.TemporaryDirectory() as temporary:
            tarball = _download(npm, package, Path(temporary))
            sha512 = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
            if sha512 != package.sha512:
                raise UserError(f"npm package {package.name} {package.version}: expected sha512 {package.sha512}, found {sha512}")
            with tarfile.open(tarball) as opened:
                for name, written in package.files.items():
                    member = opened.extractfile(f"package/{name}")
                    assert member is not None, name
                    write_bytes(folder / package.folder / written, member.read(), durable=False)
    # The npm package has no licence file; the Python package, built from the same sources, has.
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    for name in ("LICENSE", "ThirdPartyNotices.txt"):
        shutil.copyfile(Path(spec.origin).parent / name, folder / "onnxruntime-web" / name)


def _download(npm: str, package: Package, folder: Path) -> Path:
    """Download a package's tarball into a folder. Errors: UserError with npm's message."""
    requested = f"{package.name}@{package.version}"
    # npm's cache works without a network; if that fails too, a single retry makes it fail quickly.
    command = [npm, "pack", requested, "--prefer-offline", "--fetch-retries", "1", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", cwd=folder, check=False)
    tarballs = list(folder.glob("*.tgz"))
    if done.returncode != 0 or len(tarballs) != 1:
        errors = [line.split(" ", 2)[-1] for line in done.stderr.splitlines() if line.lower().startswith("npm err")]
        raise UserError(f"npm pack {requested}: expected a package, found: {'; '.join(errors[:3]) or f'exit code {done.returncode}'}")
    return tarballs[0]
