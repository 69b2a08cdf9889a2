"""Readers of WebDataset archives and Parquet files for `datasets` that refuse files which are cut short or damaged."""

from __future__ import annotations

import logging
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import IO, Any, ClassVar, Self

import datasets
import pyarrow as pa
from datasets.features.features import cast_to_python_objects
from datasets.packaged_modules.parquet import parquet
from datasets.packaged_modules.webdataset import webdataset
from datasets.utils.file_utils import ArchiveIterable
from typing_extensions import override

from configs.errors import UserError

_CHUNK = 2**20  # bytes
# Fields that `datasets` reads as whole numbers although they may hold names.
_NAMES_OR_NUMBERS = ("cls", "cls2", "index", "inx", "id")
_FIRST = 5
"""Samples that decide the fields and their types."""


class _Member(tarfile.TarInfo):
    """Header of a member. Python's reader takes a missing, cut or damaged header for the archive's end."""

    @classmethod
    @override
    def fromtarfile(cls, archive: Any) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"no end marker at byte {archive.offset:,}") from None
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"a damaged header at byte {archive.offset:,} ({error})") from None


class _Members(ArchiveIterable):
    """Names and contents of an archive's files; the archive is checked to its end while it is read."""

    @staticmethod
    @override
    def _iter_tar(f: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
        with tarfile.open(fileobj=f, mode="r|*", tarinfo=_Member) as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                if member.isreg() and not name.startswith((".", "__")):
                    content = archive.extractfile(member)
                    assert content is not None
                    yield member.name, content
                archive.members = []  # type: ignore[attr-defined]  # which would grow with the archive
            rest = archive.fileobj
            assert rest is not None
            while block := rest.read(_CHUNK):
                if block.strip(b"\0"):
                    raise tarfile.ReadError("more behind its end marker (several archives in one file?)")


class Parquet(parquet.Parquet):
    """Reader of Parquet files whose errors name the file, once."""

    def __init__(self, **arguments: Any) -> None:
        logging.getLogger(parquet.__name__).setLevel(logging.CRITICAL)  # it logs what it also raises
        super().__init__(**arguments)

    @override
    def _generate_tables(self, files: Iterable[str], **more: Any) -> Iterator[tuple[Any, Any]]:
        """Errors: UserError for a file that is cut short or damaged."""
        place = ""

        def tracked() -> Iterator[str]:
            nonlocal place
            for place in files:  # noqa: UP028, `yield from` would not keep it
                yield place

        try:
            yield from super()._generate_tables(files=tracked(), **more)
        except (ValueError, OSError) as error:  # the base classes of Arrow's errors
            if isinstance(error, OSError) and error.errno is not None:  # no file, no connection
                raise
            reason = str(error).splitlines()[0]  # the other lines list columns
            raise UserError(f"{place}: expected a whole Parquet file with the columns of the others, found: {reason}") from error


class WebDataset(webdataset.WebDataset):
    """Reader of complete archives; fields that may hold the name of a class are text, and any of the first samples may lack a field."""

    DECODERS: ClassVar[dict[str, Any]] = {**webdataset.WebDataset.DECODERS, **dict.fromkeys(_NAMES_OR_NUMBERS, bytes.decode)}

    @classmethod
    @override
    def _get_pipeline_from_tar(cls, tar_path: str, tar_iterator: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """Errors: UserError for an archive that is cut short, damaged, or not a WebDataset."""
        try:
            yield from super()._get_pipeline_from_tar(tar_path, tar_iterator)
        except (tarfile.TarError, EOFError, zlib.error, ValueError) as error:
            raise UserError(f"{tar_path}: expected a whole archive, found {error}") from error

    @override
    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        if not self.info.features:
            paths = [path for split in dl_manager.download(self.config.data_files).values() for path in split]
            samples = chain.from_iterable(self._get_pipeline_from_tar(path, self._members(path, dl_manager)) for path in paths)
            first = list(islice(samples, _FIRST))
            if not first:
                raise UserError(f"{paths[0]}: expected an archive of samples, found none in it")
            fields = dict.fromkeys(field for sample in first for field in sample)
            rows = cast_to_python_objects([{field: sample.get(field) for field in fields} for sample in first], only_1d_for_numpy=True)
            columns = pa.Table.from_pylist(rows)
            self.info.features = datasets.Features.from_arrow_schema(columns.schema)
            for field in fields:
                if _ending(field) in self.IMAGE_EXTENSIONS:
                    self.info.features[field] = datasets.Image()
        splits: list[datasets.SplitGenerator] = super()._split_generators(dl_manager)
        for split in splits:
            split.gen_kwargs["tar_iterators"] = [self._members(path, dl_manager) for path in split.gen_kwargs["tar_paths"]]
        return splits

    @staticmethod
    def _members(path: str, dl_manager: Any) -> ArchiveIterable:
        return _Members.from_urlpath(path, getattr(dl_manager, "download_config", None) if dl_manager.is_streaming else None)

    @override
    def _generate_examples(self, tar_paths: list[str], tar_iterators: list[Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
        for key, sample in super()._generate_examples(tar_paths, tar_iterators):
            for field in sample.keys() - self.info.features.keys():
                if field in _NAMES_OR_NUMBERS or _ending(field) in self.IMAGE_EXTENSIONS:
                    unknown_field = f"{sample['__key__']}.{field}, which none of the first {_FIRST} has"
                    raise UserError(f"{sample['__url__']}: expected the same fields in all samples, found {unknown_field}")
            yield key, {field: sample[field] for field in self.info.features}


def _ending(field: str) -> str:
    return field.rsplit(".", 1)[-1].lower()
