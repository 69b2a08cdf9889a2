"""Rows read from the Hub or a mounted disk as they are needed, without a copy on this machine."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.data import Data
from configs.errors import UserError, say
from stage1_vqvae.data.cache import cache_folder, cached_json
from stage1_vqvae.data.encoded import EncodedImage, num_decoding_threads, parse_encoded_image
from training.progress import progress_bar
from training.watch import progressed

if TYPE_CHECKING:
    import datasets

_BLOCK = 16  # rows
_MOST_BLOCKS = 128
_MOST_OPEN = 64  # files
_NEAR = 64
"""Blocks up to which rows of a file are read together with all blocks between them."""
_COUNTED_AT_ONCE = 1024  # rows

Block = tuple[int, int]
"""Index of a file, and of a block of its rows."""


class Stream:
    """Split streamed by `datasets`, as a `Table`: files that can only be read from their beginning to their end."""

    def __init__(
        self,
        open_rows: Callable[[list[str] | None], datasets.IterableDataset],
        files: Sequence[str],
        title: str,
        data: Data,
        origin: str,
        columnar: bool,
    ) -> None:
        """
        Args:
            open_rows: opens the rows with the named columns, or all.
            files: their names in messages, where they are known.
            title: name of the split in messages.
            data: the recipe's section.
            origin: fingerprint of the files.
            columnar: whether a column can be read without the others.
        """
        self._open_rows, self._files, self._title, self._data, self._origin = open_rows, files, title, data, origin
        self._columnar = columnar
        rows = open_rows(None)
        if rows.features is None:
            raise UserError(f"{title}: expected columns that are known before they are read, found others; leave data.stream away")
        self.features: dict[str, Any] = rows.features
        self.column_names = list(rows.features)
        self._lengths: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self.lengths().sum())

    def lengths(self) -> np.ndarray:
        """Return the rows per file, (F,)."""
        import datasets

        if self._lengths is None:
            light = [name for name, feature in self.features.items() if isinstance(feature, datasets.Value | datasets.ClassLabel)]
            # `__key__` is the one field that every sample of a WebDataset has.
            self.values(next(name for name in ("__key__", *light, *self.column_names) if name in self.column_names), keep=False)
        assert self._lengths is not None
        return self._lengths

    def values(self, column: str, keep: bool = True) -> list[Any]:
        """Return a column of numbers or text. All files are read through for it once, and the values cached."""
        key = {"stream": self._origin, "column": column, "kept": "values" if keep else "lengths"}
        content = cached_json(cache_folder(self._data), key, lambda: self._read_through(column, keep))
        self._lengths = np.asarray(content["lengths"], np.int64)
        return list(content["values"])

    def images(self, column: str) -> StreamedImages:
        """Return a column of images."""
        import datasets

        rows = self._open_rows([column] if self._columnar else None)
        if isinstance(self.features[column], datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        threads = max(1, num_decoding_threads(self._data))
        return StreamedImages(rows.select_columns([column]), column, self.lengths(), threads, self._file_name)

    def fingerprint(self) -> str:
        """Return a text that changes whenever the files change."""
        return f"{len(self)} {self._origin}"

    def _file_name(self, file: int) -> str:
        return f"{self._title}, {self._files[file] if file < len(self._files) else f'file {file}'}"

    def _read_through(self, column: str, keep: bool) -> dict[str, Any]:
        say(f"{self._title}: reading its files through, once for all commands, to know how many images each has, and their labels")
        import datasets

        rows = self._open_rows([column] if self._columnar else None)
        if isinstance(self.features[column], datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        rows = rows.select_columns([column])
        count = rows.num_shards

        def read(file: int) -> tuple[int, list[Any]]:
            length, values = 0, list[Any]()
            try:
                for chunk in rows.shard(count, file).iter(_COUNTED_AT_ONCE):
                    length += len(chunk[column])
                    values += chunk[column] if keep else []
                    progressed()
            except Exception as error:
                raise unreadable(self._file_name(file), error) from None
            return length, values

        with ThreadPoolExecutor(max(1, num_decoding_threads(self._data))) as pool, progress_bar(count, "read through", "file") as bar:
            files = []
            for file in pool.map(read, range(count)):
                files.append(file)
                bar.update(1)
        return {"lengths": [length for length, _ in files], "values": [value for _, values in files for value in values]}


class StreamedImages:
    """Encoded images in files that are read from end to end.

    Any rows may be requested. Rows near one another in a file are read in blocks, which are cached for a while, and the next block is
    prefetched in a thread. For rows far apart a file is read forwards once per request. Files stay open at the position of the last read.
    """

    def __init__(
        self, rows: datasets.IterableDataset, column: str, file_lengths: np.ndarray, threads: int, file_name: Callable[[int], str]
    ) -> None:
        """
        Args:
            rows: rows with a column of images that are not decoded.
            column: name of the column.
            file_lengths: (F,) rows per file.
            threads: number of reading threads.
            file_name: returns a file's name in messages.
        """
        assert rows.num_shards == len(file_lengths)
        self.file_lengths, self._rows, self._column, self._file_name = file_lengths, rows, column, file_name
        self._ends = np.cumsum(file_lengths)
        self._pool = ThreadPoolExecutor(threads)
        self._lock = threading.Lock()
        self._blocks: OrderedDict[Block, Future[list[EncodedImage]]] = OrderedDict()
        self._open: OrderedDict[Block, Iterator[dict[str, list[Any]]]] = OrderedDict()
        """Open files, each by the block that it continues with."""

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, rows: list[int]) -> list[EncodedImage]:
        files = np.searchsorted(self._ends, rows, side="right")
        offsets = np.asarray(rows, np.int64) - (self._ends - self.file_lengths)[files]
        near: list[Block] = []
        sparse: dict[int, Future[dict[int, EncodedImage]]] = {}
        for file in np.unique(files).tolist():
            requested = np.unique(offsets[files == file])
            first, last = int(requested[0]) // _BLOCK, int(requested[-1]) // _BLOCK
            if last - first < _NEAR:
                near += [(file, block) for block in range(first, last + 1)]
            else:
                sparse[file] = self._pool.submit(self._read_sparse, file, requested.tolist())
        blocks = self._read_blocks(near)
        images = {file: future.result() for file, future in sparse.items()}
        positions = zip(files.tolist(), offsets.tolist(), strict=True)
        return [images[file][row] if file in images else blocks[file, row // _BLOCK][row % _BLOCK] for file, row in positions]

    def _read_blocks(self, requested: Sequence[Block]) -> dict[Block, list[EncodedImage]]:
        """Read blocks, and prefetch the next one of each file."""
        futures = self._futures(requested)
        try:
            images = {block: future.result() for block, future in futures.items()}
        except BaseException:
            with self._lock:
                for block in requested:
                    self._blocks.pop(block, None)
            raise
        last = dict(requested)  # last block per file
        self._futures([(file, block + 1) for file, block in last.items() if (block + 1) * _BLOCK < self.file_lengths[file]])
        with self._lock:
            while len(self._blocks) > _MOST_BLOCKS:
                self._blocks.popitem(last=False)
        return images

    def _futures(self, blocks: Sequence[Block]) -> dict[Block, Future[list[EncodedImage]]]:
        """Return the futures of blocks; reading begins for those that are neither cached nor under way, one after another per file."""
        with self._lock:
            missing: dict[int, list[int]] = {}
            for file, block in blocks:
                if (file, block) not in self._blocks:
                    self._blocks[file, block] = Future()
                    missing.setdefault(file, []).append(block)
                self._blocks.move_to_end((file, block))
            futures = {block: self._blocks[block] for block in blocks}
            for file, file_blocks in missing.items():  # under the lock, so that no task waits for one behind it in the queue
                before = self._blocks.get((file, file_blocks[0] - 1))
                self._pool.submit(self._read, file, file_blocks, [futures[file, block] for block in file_blocks], before)
        return futures

    def _read(
        self, file: int, blocks: Sequence[int], futures: Sequence[Future[list[EncodedImage]]], before: Future[list[EncodedImage]] | None
    ) -> None:
        """Read ascending blocks of a file, and cache those between its position and the first: they will be requested soon."""
        if before is not None:  # the task that reads the block before leaves the file at the right position
            before.exception()
        with self._lock:
            starts = [block for other, block in self._open if other == file and blocks[0] - _NEAR <= block <= blocks[0]]
            first = max(starts, default=blocks[0])
            between = {
                (file, block): Future[list[EncodedImage]]() for block in range(first, blocks[0]) if (file, block) not in self._blocks
            }
            self._blocks |= between
        blocks, futures = [*(block for _, block in between), *blocks], [*between.values(), *futures]
        try:
            for (block, images), future in zip(self._read_forwards(file, blocks), futures, strict=True):
                future.set_result([images[block * _BLOCK + offset] for offset in range(len(images))])
        except BaseException as error:
            for future in futures:
                if not future.done():
                    future.set_exception(error)

    def _read_sparse(self, file: int, offsets: Sequence[int]) -> dict[int, EncodedImage]:
        """Read ascending rows of a file without keeping the rows between them."""
        requested, result = set(offsets), dict[int, EncodedImage]()
        for _, images in self._read_forwards(file, sorted({offset // _BLOCK for offset in offsets})):
            result |= {offset: image for offset, image in images.items() if offset in requested}
        return result

    def _read_forwards(self, file: int, blocks: Sequence[int]) -> Iterator[tuple[int, dict[int, EncodedImage]]]:
        """Yield ascending blocks of a file with their images by row of the file; before the last one, the open file is stored.

        Errors: UserError, of many causes.
        """
        position, rows = self._take_open(file, blocks[0])
        length, records = int(self.file_lengths[file]), list[Any]()
        for block in blocks:
            try:
                if rows is None:
                    rows = iter(self._rows.shard(len(self.file_lengths), file).skip(position * _BLOCK).iter(_BLOCK))
                while position <= block:
                    records = next(rows, {self._column: []})[self._column]
                    position += 1
            except Exception as error:  # no connection, a broken file
                raise unreadable(self._file_name(file), error) from None
            if len(records) != min(_BLOCK, length - block * _BLOCK):
                raise UserError(f"{self._file_name(file)}: expected {length} images, as when it was read first, found fewer")
            if block == blocks[-1] and position * _BLOCK < length:  # before the last is seen and the blocks after it are requested
                self._store_open(file, position, rows)
            yield block, {block * _BLOCK + offset: parse_encoded_image(record) for offset, record in enumerate(records)}

    def _take_open(self, file: int, block: int) -> tuple[int, Iterator[dict[str, list[Any]]] | None]:
        """Return the position of the open file nearest before a block, and the file; or the block and None."""
        with self._lock:
            before = [position for other, position in self._open if other == file and block - _NEAR <= position <= block]
            return (block, None) if not before else (max(before), self._open.pop((file, max(before))))

    def _store_open(self, file: int, position: int, rows: Iterator[dict[str, list[Any]]]) -> None:
        with self._lock:
            self._open[file, position] = rows
            while len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)


def unreadable(name: str, error: BaseException) -> UserError:
    """Return a UserError for any failure to read a file: no connection, a deleted or broken file."""
    if isinstance(error, UserError):
        return error
    return UserError(f"{name}: expected to read it from end to end, found: {str(error) or type(error).__name__}")
