"""Anything that holds rows → rows, one after another, each with the words that name it in an error.

    .jsonl .ndjson .json .csv .tsv .parquet .txt, with .gz too │ ORG/NAME on the hub │ a folder of save_to_disk
    a list of texts or dicts, a dict of columns, a Dataset, an IterableDataset, a DataFrame, any iterable

Rows are read as they are asked for, so that a limit stops the reading. Files are UTF-8, with or without a byte-order
mark, with either kind of line end; blank lines are passed over. What a row must hold is the business of `data_rows.py`.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from io import BufferedIOBase
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from tether.errors import InputError

DataSource: TypeAlias = str | Path | Iterable[object]
"""Where rows come from: a file, a name on the hub, or an object that holds them."""

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
ROWS_AT_ONCE = 256  # of a Parquet file, in memory
SEPARATORS = ",;\t"
SHOWN = 8  # names that an error lists


@dataclass(frozen=True)
class Row:
    """One row as it was read."""

    where: str
    """What errors call it: the source and the row's number from 1, with its line where that is another."""
    content: object


@dataclass(frozen=True)
class Rows:
    """All rows of a source, read as they are asked for."""

    name: str
    """What errors call the source."""
    content: Iterable[Row]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.content)

    def first(self, limit: int | None) -> Rows:
        """At most so many of them; the rest is never read."""
        if limit is not None and limit < 1:
            raise InputError(f"limit is {limit}; wanted 1 or more, or none for all rows")
        return replace(self, content=islice(iter(self.content), limit))


def open_rows(
    source: DataSource, *, split: str | None = None, subset: str | None = None, limit: int | None = None
) -> Rows:
    """The rows of this source.

    `split`: of a data set that has several; "train" where it is there and nothing is said. `subset`: the
    configuration of a data set on the hub. `limit`: rows to read at most; a data set on the hub is then streamed.

    Raises InputError where the source is missing, of an unknown kind, or cannot be read.
    """
    if isinstance(source, str | Path):
        return _named(str(source), split, subset, limit).first(limit)
    return _held(source, type(source).__name__, split).first(limit)


def numbered(name: str, contents: Iterable[object]) -> Rows:
    """Rows of a source in which rows are all there is to count."""
    return Rows(name, (Row(f"{name}, row {number}", content) for number, content in enumerate(contents, start=1)))


# ── by name ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _named(source: str, split: str | None, subset: str | None, limit: int | None) -> Rows:
    if "://" in source:
        raise InputError(
            f"{source} is an address; wanted a file here, or ORG/NAME of a data set on the hub: download it first, or "
            "pass what datasets.load_dataset gives"
        )
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, split)
    if path.is_file():
        return _file(path, split)
    if HUB_NAME.fullmatch(source) and _kind(path) is None and not path.parent.exists():
        return _held(_from_hub(source, split, subset, limit), source, split)
    raise InputError(_missing(path))


def _missing(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no file {path}, nor a folder {folder}; a data set on the hub is named ORG/NAME"
    if " " in path.name and not path.suffix:
        return f"there is no file {path}; a text by itself goes into a list: [{str(path)!r}]"
    names = [entry.name for entry in folder.iterdir() if entry.is_dir() or _kind(entry)]
    near = get_close_matches(path.name, names, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(str(folder / name) for name in near)}?" if near else "check the name"
    return f"there is no file {path}; {hint} (a data set on the hub is named ORG/NAME)"


def _from_hub(name: str, split: str | None, subset: str | None, limit: int | None) -> object:
    """The data set of this name; streamed where only its beginning is wanted."""
    import datasets

    try:
        return datasets.load_dataset(name, subset, split=split, streaming=limit is not None)
    except Exception as fault:  # the loaders of data sets raise whatever the network and the files bring
        first = str(fault).strip().split("\n")[0]
        raise InputError(
            f"cannot load the data set {name!r} from the hub: {first}. Wanted a file, or ORG/NAME of a data set that "
            "can be reached from here; choose its configuration with subset= and its part with split="
        ) from fault


def _folder(path: Path, split: str | None) -> Rows:
    """A folder that `save_to_disk` wrote."""
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        import datasets

        return _held(datasets.load_from_disk(str(path)), str(path), split)
    inside = sorted(entry.name for entry in path.iterdir() if _kind(entry))[:SHOWN]
    hint = f"did you mean {' or '.join(str(path / name) for name in inside)}?" if inside else "it holds no such file"
    raise InputError(f"{path} is a folder; wanted one file ({', '.join(READERS)}): {hint}")


# ── objects ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _held(source: object, name: str, split: str | None) -> Rows:
    """The rows of an object."""
    if isinstance(source, Mapping):
        return _mapping(source, name, split)
    if hasattr(source, "iterrows"):  # a DataFrame, which iterates over the names of its columns
        return numbered(name, source.to_dict("records"))  # type: ignore[attr-defined]
    if isinstance(source, Iterable) and not isinstance(source, bytes):
        return numbered(name, source)
    raise InputError(f"the data is a {name}; wanted a file, a data set's name, a list of texts or dicts, or a Dataset")


def _mapping(source: Mapping[object, object], name: str, split: str | None) -> Rows:
    """Columns of one length, or a data set in several splits."""
    if any(isinstance(entry, str) for entry in source.values()):
        raise InputError(
            f"the data is one row with the columns {_listed(source)}; wanted a list of rows: put it in [ ]"
        )
    if _is_row(source):
        return numbered(name, [source])
    if source and all(isinstance(entry, list | tuple) for entry in source.values()) and not _is_splits(source):
        return numbered(name, _transposed(source, name))
    if split is None and "train" not in source and len(source) != 1:
        raise InputError(f"{name} has the splits {_listed(source) or '(none)'}; choose one with split=")
    chosen = split or ("train" if "train" in source else next(iter(source)))
    if chosen not in source:
        raise InputError(f"{name} has no split {chosen!r}; it has {_listed(source)}")
    return _held(source[chosen], name, None)


def _is_row(entry: Mapping[object, object]) -> bool:
    """Whether a dict of lists is one row of conversations."""
    return any(isinstance(part, list) and part and _is_dict_with(part[0], "role") for part in entry.values())


def _is_splits(entry: Mapping[object, object]) -> bool:
    """Whether a dict of lists holds lists of rows."""
    return all(isinstance(row, Mapping) for part in entry.values() for row in part)  # type: ignore[attr-defined]


def _is_dict_with(entry: object, key: str) -> bool:
    return isinstance(entry, Mapping) and key in entry


def _listed(names: Iterable[object]) -> str:
    every = [str(name) for name in names]
    return ", ".join(every[:SHOWN]) + (" …" if len(every) > SHOWN else "")


def _transposed(columns: Mapping[object, object], name: str) -> Iterator[Mapping[object, object]]:
    lengths = {str(key): len(column) for key, column in columns.items()}  # type: ignore[arg-type]
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise InputError(f"the columns of {name} differ in length ({listed}); wanted one entry a row in each")
    rows = zip(*columns.values(), strict=True)
    return (dict(zip(columns, row, strict=True)) for row in rows)


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def _kind(path: Path) -> str | None:
    """How the file is read, by the end of its name."""
    name = path.name.lower().removesuffix(".gz")
    return next((ending for ending in READERS if name.endswith(ending)), None)


def _file(path: Path, split: str | None) -> Rows:
    kind = _kind(path)
    if kind is None:
        raise InputError(f"cannot tell what {path} holds; wanted a name that ends in {', '.join(READERS)}")
    return READERS[kind](path, split)


def _open(path: Path) -> BufferedIOBase:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The file's lines that are not blank, with their numbers from 1, without their ends."""
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, start=1):
                line = _decoded(raw, f"{path}, line {number}", first=number == 1).rstrip("\r\n")
                if line.strip():
                    yield number, line
    except (OSError, EOFError) as fault:
        raise InputError(f"cannot read {path}: {fault}") from fault


def _decoded(raw: bytes, where: str, first: bool) -> str:
    if first and raw.startswith(UTF_16):
        raise InputError(f"{where} begins as UTF-16 text does; save the file as UTF-8")
    try:
        return raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as fault:
        raise InputError(
            f"{where} is no UTF-8 (byte 0x{raw[fault.start]:02x} at column {fault.start + 1}); save the file as UTF-8, "
            "as by: iconv -f latin1 -t utf-8"
        ) from fault


def _placed(path: Path, entries: Iterable[tuple[int, object]]) -> Iterator[Row]:
    """Rows with their numbers, and their lines where blank ones stand between."""
    for number, (line, content) in enumerate(entries, start=1):
        yield Row(f"{path}, row {number}" + (f" (line {line})" if line != number else ""), content)


def _text(path: Path, _: str | None) -> Rows:
    """One prompt a line."""
    return Rows(str(path), _placed(path, ((number, {"prompt": line}) for number, line in _lines(path))))


def _json_lines(path: Path, split: str | None) -> Rows:
    """One JSON value a line; or one list of rows, whatever the file's name says."""
    beginning = next(_lines(path), (0, ""))[1]
    if beginning.startswith("[") and not _is_conversation(beginning):
        return _json(path, split)
    return _each_line(path)


def _each_line(path: Path) -> Rows:
    parsed = ((number, _parse(line, f"{path}, line {number}")) for number, line in _lines(path))
    return Rows(str(path), _placed(path, parsed))


def _is_conversation(line: str) -> bool:
    """Whether a line that begins a list is one whole row of messages."""
    try:
        first = json.loads(line)
    except ValueError:
        return False
    return bool(first) and _is_dict_with(first[0], "role")


def _json(path: Path, split: str | None) -> Rows:
    """A list of rows, an object of columns or splits, one row, or JSON lines under the name of JSON."""
    lines = list(_lines(path))
    text = "\n".join(line for _, line in lines)
    try:
        whole = json.loads(text) if text else []
    except ValueError:
        if text.startswith("[") and not _is_conversation(lines[0][1]):
            _parse(text, str(path))
        return _each_line(path)
    if isinstance(whole, dict) and whole and all(isinstance(part, list) for part in whole.values()):
        return _mapping(whole, str(path), split)
    return numbered(str(path), whole if isinstance(whole, list) else [whole])


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except ValueError as fault:
        raise InputError(f"{where} is no JSON ({fault}); wanted one JSON object a line, or one list of them") from fault


def _csv(path: Path, _: str | None) -> Rows:
    """Values separated by whichever of comma, semicolon and tab the first line holds most of."""
    return Rows(str(path), _placed(path, enumerate(_csv_records(path), start=1)))


def _csv_records(path: Path) -> Iterator[object]:
    """Each record as column → text."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a long text is no fault
    separator = max(SEPARATORS, key=next(_csv_lines(path), "").count)
    reader = csv.reader(_csv_lines(path), delimiter=separator, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise InputError(f"{path} names a column twice: {_listed(header)}; wanted different names")
        for number, fields in enumerate((fields for fields in reader if not _is_blank(fields, header)), start=1):
            if len(fields) != len(header):
                raise InputError(
                    f"{path}, row {number} has {len(fields)} fields and the first line names {len(header)} columns "
                    f"({_listed(header)}); put texts that hold separators or line ends in quotes"
                )
            yield dict(zip(header, fields, strict=True))
    except csv.Error as fault:
        raise InputError(f"{path} is no CSV near line {reader.line_num}: {fault}") from fault


def _is_blank(fields: list[str], header: list[str]) -> bool:
    """Whether a record is a line with nothing on it; a lone column may hold an empty text in quotes."""
    return not fields or (len(fields) == 1 < len(header) and not fields[0].strip())


def _csv_lines(path: Path) -> Iterator[str]:
    """Lines with their ends, which may stand inside a quoted text."""
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, start=1):
                yield _decoded(raw, f"{path}, line {number}", first=number == 1)
    except (OSError, EOFError) as fault:
        raise InputError(f"cannot read {path}: {fault}") from fault


def _parquet(path: Path, _: str | None) -> Rows:
    return numbered(str(path), _parquet_rows(path))


def _parquet_rows(path: Path) -> Iterator[object]:
    import pyarrow
    import pyarrow.parquet

    try:
        with _open(path) as file:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except (OSError, EOFError, pyarrow.ArrowException) as fault:
        raise InputError(f"{path} cannot be read as Parquet: {str(fault).splitlines()[0]}") from fault


Reader: TypeAlias = Callable[[Path, str | None], Rows]
READERS: Mapping[str, Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
}
