"""Rows that are read where they are, of the Hub or of files on some mounted disk, without a copy on this machine."""

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
"""Blocks: rows that lie further from one another in a file are not read with all that lies between."""
_COUNTED_AT_ONCE = 1024  # rows

Block = tuple[int, int]
"""The number of a file, and of a block of its rows."""


class Stream:
    """A split as `datasets` streams it: files, each of which can only be read from its beginning to its end; a `Table`."""

    def __init__(
        self,
        open_rows: Callable[[list[str] | None], datasets.IterableDataset],
        files: Sequence[str],
        what: str,
        data: Data,
        origin: str,
        columnar: bool,
    ) -> None:
        """
        Args:
            open_rows: the rows, with those columns, or all.
            files: their names, for messages, where they are known.
            what: the split is, for messages.
            data: the recipe's.
            origin: what is another if the files are.
            columnar: whether a column can be read without the others.
        """
        self._open_rows, self._files, self._what, self._data, self._origin = open_rows, files, what, data, origin
        self._columnar = columnar
        rows = open_rows(None)
        if rows.features is None:
            raise UserError(f"{what}: expected columns that are known before they are read, found others; leave data.stream away")
        self.features: dict[str, Any] = rows.features
        self.column_names = list(rows.features)
        self._lengths: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self.lengths().sum())

    def lengths(self) -> np.ndarray:
        """Rows of each file, (F,)."""
        import datasets

        if self._lengths is None:
            light = [name for name, feature in self.features.items() if isinstance(feature, datasets.Value | datasets.ClassLabel)]
            # The name of a WebDataset's sample is the one field that every sample has.
            self.values(next(name for name in ("__key__", *light, *self.column_names) if name in self.column_names), keep=False)
        assert self._lengths is not None
        return self._lengths

    def values(self, column: str, keep: bool = True) -> list[Any]:
        """A column of numbers or text. All files are read through for it, once: what they hold is kept beside decoded images."""
        key = {"stream": self._origin, "column": column, "kept": "values" if keep else "lengths"}
        found = cached_json(cache_folder(self._data), key, lambda: self._read_through(column, keep))
        self._lengths = np.asarray(found["lengths"], np.int64)
        return list(found["values"])

    def images(self, column: str) -> StreamedImages:
        """Its images."""
        import datasets

        rows = self._open_rows([column] if self._columnar else None)
        if isinstance(self.features[column], datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        threads = max(1, num_decoding_threads(self._data))
        return StreamedImages(rows.select_columns([column]), column, self.lengths(), threads, self._named)

    def fingerprint(self) -> str:
        """What is another if its files are."""
        return f"{len(self)} {self._origin}"

    def _named(self, file: int) -> str:
        return f"{self._what}, {self._files[file] if file < len(self._files) else f'file {file}'}"

    def _read_through(self, column: str, keep: bool) -> dict[str, Any]:
        say(f"{self._what}: reading its files through, once for all commands, to know how many images each has, and their labels")
        import datasets

        rows = self._open_rows([column] if self._columnar else None)
        if isinstance(self.features[column], datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        rows = rows.select_columns([column])
        count = rows.num_shards

        def read(file: int) -> tuple[int, list[Any]]:
            length, values = 0, list[Any]()
            try:
                for part in rows.shard(count, file).iter(_COUNTED_AT_ONCE):
                    length += len(part[column])
                    values += part[column] if keep else []
                    progressed()
            except Exception as error:
                raise unreadable(self._named(file), error) from None
            return length, values

        with ThreadPoolExecutor(max(1, num_decoding_threads(self._data))) as pool, progress_bar(count, "read through", "file") as bar:
            found = []
            for of_file in pool.map(read, range(count)):
                found.append(of_file)
                bar.update(1)
        return {"lengths": [length for length, _ in found], "values": [value for _, values in found for value in values]}


class StreamedImages:
    """Encoded images of files that are read from end to end.

    Any rows can be asked for. Those that lie near one another in a file are read in blocks, all of which are kept for a while; and the
    block after them is read ahead, in a thread. Of others a file is read forwards once for all that are asked for together. Files stay open
    where they were left.
    """

    def __init__(
        self, rows: datasets.IterableDataset, column: str, file_lengths: np.ndarray, threads: int, named: Callable[[int], str]
    ) -> None:
        """
        Args:
            rows: with a column of images that are not decoded.
            column: its name.
            file_lengths: rows of each file, (F,).
            threads: that read.
            named: what a file is called in messages.
        """
        assert rows.num_shards == len(file_lengths)
        self.file_lengths, self._rows, self._column, self._named = file_lengths, rows, column, named
        self._ends = np.cumsum(file_lengths)
        self._pool = ThreadPoolExecutor(threads)
        self._lock = threading.Lock()
        self._blocks: OrderedDict[Block, Future[list[EncodedImage]]] = OrderedDict()
        self._open: OrderedDict[Block, Iterator[dict[str, list[Any]]]] = OrderedDict()
        """Files that were left before that block."""

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, rows: list[int]) -> list[EncodedImage]:
        files = np.searchsorted(self._ends, rows, side="right")
        offsets = np.asarray(rows, np.int64) - (self._ends - self.file_lengths)[files]
        near: list[Block] = []
        picked: dict[int, Future[dict[int, EncodedImage]]] = {}
        for file in np.unique(files).tolist():
            wanted = np.unique(offsets[files == file])
            first, last = int(wanted[0]) // _BLOCK, int(wanted[-1]) // _BLOCK
            if last - first < _NEAR:
                near += [(file, block) for block in range(first, last + 1)]
            else:
                picked[file] = self._pool.submit(self._pick, file, wanted.tolist())
        found = self._in_blocks(near)
        apart = {file: future.result() for file, future in picked.items()}
        places = zip(files.tolist(), offsets.tolist(), strict=True)
        return [apart[file][row] if file in apart else found[file, row // _BLOCK][row % _BLOCK] for file, row in places]

    def _in_blocks(self, wanted: Sequence[Block]) -> dict[Block, list[EncodedImage]]:
        futures = self._futures(wanted)
        try:
            found = {block: future.result() for block, future in futures.items()}
        except BaseException:
            with self._lock:
                for block in wanted:
                    self._blocks.pop(block, None)
            raise
        last = dict(wanted)  # of each file
        self._futures([(file, block + 1) for file, block in last.items() if (block + 1) * _BLOCK < self.file_lengths[file]])
        with self._lock:
            while len(self._blocks) > _MOST_BLOCKS:
                self._blocks.popitem(last=False)
        return found

    def _futures(self, blocks: Sequence[Block]) -> dict[Block, Future[list[EncodedImage]]]:
        """What is, or will be, in the blocks; those that nobody has asked for are read, of each file one after another."""
        with self._lock:
            missing: dict[int, list[int]] = {}
            for file, block in blocks:
                if (file, block) not in self._blocks:
                    self._blocks[file, block] = Future()
                    missing.setdefault(file, []).append(block)
                self._blocks.move_to_end((file, block))
            found = {block: self._blocks[block] for block in blocks}
            for file, of_file in missing.items():  # under the lock, so that a task waits for none that is behind it in the queue
                before = self._blocks.get((file, of_file[0] - 1))
                self._pool.submit(self._read, file, of_file, [found[file, block] for block in of_file], before)
        return found

    def _read(
        self, file: int, blocks: Sequence[int], futures: Sequence[Future[list[EncodedImage]]], before: Future[list[EncodedImage]] | None
    ) -> None:
        """Read ascending blocks of a file, and keep those that lie between where it was left and them: they will be asked for soon."""
        if before is not None:  # who reads it, asked for earlier, leaves the file where it is wanted here
            before.exception()
        with self._lock:
            first = max((place for of, place in self._open if of == file and blocks[0] - _NEAR <= place <= blocks[0]), default=blocks[0])
            between = {
                (file, block): Future[list[EncodedImage]]() for block in range(first, blocks[0]) if (file, block) not in self._blocks
            }
            self._blocks |= between
        blocks, futures = [*(block for _, block in between), *blocks], [*between.values(), *futures]
        try:
            for (block, images), future in zip(self._forwards(file, blocks), futures, strict=True):
                future.set_result([images[block * _BLOCK + within] for within in range(len(images))])
        except BaseException as error:
            for future in futures:
                if not future.done():
                    future.set_exception(error)

    def _pick(self, file: int, offsets: Sequence[int]) -> dict[int, EncodedImage]:
        """Ascending rows of a file, and nothing of what lies between."""
        wanted, found = set(offsets), dict[int, EncodedImage]()
        for _, images in self._forwards(file, sorted({offset // _BLOCK for offset in offsets})):
            found |= {offset: image for offset, image in images.items() if offset in wanted}
        return found

    def _forwards(self, file: int, blocks: Sequence[int]) -> Iterator[tuple[int, dict[int, EncodedImage]]]:
        """Ascending blocks of a file, the images in them by their number in the file; before the last comes out, the file is left there.

        Errors: UserError, of many causes.
        """
        place, rows = self._taken(file, blocks[0])
        length, records = int(self.file_lengths[file]), list[Any]()
        for block in blocks:
            try:
                if rows is None:
                    rows = iter(self._rows.shard(len(self.file_lengths), file).skip(place * _BLOCK).iter(_BLOCK))
                while place <= block:
                    records = next(rows, {self._column: []})[self._column]
                    place += 1
            except Exception as error:  # no connection, a broken file
                raise unreadable(self._named(file), error) from None
            if len(records) != min(_BLOCK, length - block * _BLOCK):
                raise UserError(f"{self._named(file)}: expected {length} images, as when it was read first, found fewer")
            if block == blocks[-1] and place * _BLOCK < length:  # before anybody learns of the last, and asks for what follows
                self._leave(file, place, rows)
            yield block, {block * _BLOCK + within: parse_encoded_image(record) for within, record in enumerate(records)}

    def _taken(self, file: int, block: int) -> tuple[int, Iterator[dict[str, list[Any]]] | None]:
        """A file that is open nearest before a block, and where; or one to be opened there."""
        with self._lock:
            before = [place for of, place in self._open if of == file and block - _NEAR <= place <= block]
            return (block, None) if not before else (max(before), self._open.pop((file, max(before))))

    def _leave(self, file: int, place: int, rows: Iterator[dict[str, list[Any]]]) -> None:
        with self._lock:
            self._open[file, place] = rows
            while len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)


def unreadable(name: str, error: BaseException) -> UserError:
    """What went wrong with a file, of many kinds: no connection, no such file any more, a broken one."""
    if isinstance(error, UserError):
        return error
    return UserError(f"{name}: expected to read it from end to end, found: {str(error) or type(error).__name__}")
