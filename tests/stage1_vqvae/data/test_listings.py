"""Tables of metadata beside images."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import UserError
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN
from tests.stage1_vqvae.data.picture_sources import MISSING, data, rows_of, write_folders, write_listed


def test_metadata_selects_images_and_labels(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images absent from the metadata are left out, and metadata without a label column means no labels; both are reported."""
    write_listed(tmp_path / "some", rows_of(pictures))
    lines = (tmp_path / "some/metadata.csv").read_text().splitlines()
    (tmp_path / "some/metadata.csv").write_text("\n".join(lines[:-3]) + "\n")
    assert sum(map(len, load_images(data(tmp_path / "some"), announce=True).splits.values())) == 45
    assert "train: 3 images that the metadata does not name are left out" in capsys.readouterr().out
    write_folders(tmp_path / "folders", rows_of(pictures))
    names = sorted(path.relative_to(tmp_path / "folders").as_posix() for path in (tmp_path / "folders").rglob("*.png"))
    (tmp_path / "folders/metadata.csv").write_text("\n".join(["file_name,text", *(f"{name},hello" for name in names)]) + "\n")
    source = load_images(data(tmp_path / "folders"), announce=True)
    assert source.label_names is None
    assert "no labels: the metadata, which stands for the folders' names, has no column of them" in capsys.readouterr().out


CSV, JSON, NAMES = "metadata.csv", "metadata.jsonl", "expected names of files in its folder, found "
TABLES: dict[str, tuple[str, str, str]] = {
    # case: name of the table, its content for the images a.png to d.png, class names or the error
    "words": (CSV, "file_name,label\na.png,NA\nb.png,null\nc.png,TRUE\nd.png,N/A\n", "N/A NA TRUE null"),
    "numbers": (CSV, "file_name,label\na.png,007\nb.png,1e3\nc.png,7\nd.png,1.0\n", "007 1.0 1e3 7"),
    "blanks and a byte order mark": (CSV, "\ufefffile_name, label\r\na.png, 10\r\nb.png, 9\r\n", "9 10"),
    "an empty cell": (CSV, "file_name,label\na.png,1\nb.png,\nc.png,0\n", MISSING + r" \(.*b\.png\)"),
    "cut in a name": (CSV, "file_name,label\na.png,1\nb.p", "expected a table .*1 values in line 3 under a header of 2"),
    "a name of nothing": (CSV, "file_name,label\na.png,1\nx.png,1\n", NAMES + "'x.png'"),
    "a file elsewhere": (CSV, "file_name,label\n/etc/hostname,1\n", NAMES + "'/etc/hostname'"),
    "JSON": (JSON, "".join(json.dumps({"file_name": f"{name}.png", "label": name}) + "\n" for name in "abcd"), "a b c d"),
    "several kinds": (JSON, '{"file_name": "a.png", "label": 1}\n{"file_name": "b.png", "label": "x"}\n', "expected .* kinds in label"),
    "cut in a line": (JSON, '{"file_name": "a.png", "label": 1}\n{"file_name": "b', "expected a table .*line 2 is not a JSON object"),
}


@pytest.mark.parametrize("case", TABLES)
def test_metadata_tables_are_read_or_refused(case: str, pictures: Path, tmp_path: Path) -> None:
    name, content, outcome = TABLES[case]
    for image, (encoded, _) in zip("abcd", rows_of(pictures), strict=False):
        (tmp_path / f"{image}.png").write_bytes(encoded)
    (tmp_path / name).write_bytes(content.encode())
    if outcome.startswith("expected"):
        with pytest.raises(UserError, match=outcome):
            load_images(data(tmp_path))
    else:
        assert load_images(data(tmp_path), hold_out=False).label_names == outcome.split()


def test_rows_of_several_metadata_tables_are_ordered_by_path(pictures: Path, tmp_path: Path) -> None:
    rows = rows_of(pictures)
    for number in range(6):
        write_listed(tmp_path / str(number), rows[number * 8 : (number + 1) * 8])
    source = load_images(data(tmp_path), hold_out=False)
    split = source.splits[TRAIN]
    assert np.array_equal(split.pixels[:].numpy(), np.stack([np.asarray(Image.open(io.BytesIO(content))) for content, _ in rows]))
    assert split.labels is not None
    assert split.labels.tolist() == [int(name == "down") for _, name in rows]
