"""`Checkpoint`: a folder in Hugging Face's layout, whose tensors are read one at a time.

config.json describes the model's shape, *.safetensors hold its tensors, tokenizer.json or tokenizer.model its
vocabulary. A safetensors file is a JSON header (name, dtype, shape and offset of each tensor), then plain numbers.
Reading it cannot run code, and one tensor, or a slice of it, can be read without the rest. The older `.bin` and `.pt`
files are pickles, which can run anything when opened. This module never opens one.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

LARGEST_JSON = 256 << 20  # bytes; the largest vocabularies have 35 MB
ABSENT_EXPERTS = 128  # the number of experts in a mixture of experts whose config.json does not say it
LONGEST = 900  # characters of an error
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the dtypes that a weight may have


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete or corrupt. The text names the file and, if one is at fault, the tensor.

    The middle of a long text, which may list the hundred tensors of a large model, is left out.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text if len(text) <= LONGEST else f"{text[:600]} ... {text[-200:]}")


def check_size(path: Path, most: int, problem: str) -> None:
    """Raise CheckpointError if a file has more than `most` bytes. problem: the end of the sentence that says so."""
    if (size := path.stat().st_size) > most:
        raise CheckpointError(f"{path}: has {size:,} bytes{problem}.")


def read_text(path: Path, most: int, problem: str) -> str:
    """Read a text of at most `most` bytes. Raises CheckpointError, naming the file. problem: as in `check_size`."""
    try:
        check_size(path, most, problem)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as text ({error!s:.200}).") from error


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises CheckpointError, naming the file, if it is absent, too large or something else."""
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise ValueError(f"it has {size:,} bytes, and no more than {LARGEST_JSON:,} are read")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # halves of characters, which may lack their other half
            json.dumps(value, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise CheckpointError(f"{path}: a text in it has half of a character, {half}. Download it again.") from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, or a number of 5,000 digits
        raise CheckpointError(f"{path}: not valid JSON ({error}). Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object was expected, and it holds a {type(value).__name__}.")
    return value


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Checkpoint:
    """The tensors of a checkpoint folder, by name. The constructor reads only headers; `read` reads a tensor.

    The tensors lie in model.safetensors, or in several files ("shards") that model.safetensors.index.json lists. Their
    names begin with `model.`, even if the files omit it. config: the content of config.json. Raises CheckpointError.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such folder.")
        if not (self.folder / "config.json").is_file():
            raise CheckpointError(
                f"{self.folder} has no config.json, which says what shape the model has. Is this the folder of a "
                "checkpoint? Its config.json must lie beside its *.safetensors."
            )
        self.config = read_json(self.folder / "config.json")
        self.num_bytes_read = 0  # of tensors, in the file's dtype
        self._open = {}  # file -> safetensors handle; the file is mapped, not read
        self._files = self._find_tensors()  # tensor name -> file
        # A base model, which has no head, is stored without the prefix that its names have within a whole model.
        self._prefix = "model." if "embed_tokens.weight" in self._files else ""
        self._files = {
            name if name.startswith("lm_head.") else self._prefix + name: file for name, file in self._files.items()
        }
        self._check_layers()
        self._check_head()

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._files)

    def file(self, name: str) -> Path:
        """The file that holds tensor `name`. Raises CheckpointError if there is no such tensor."""
        if name not in self._files:
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}.")
        return self._files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, without reading it."""
        return tuple(self._open[self.file(name)].get_slice(self._stored(name)).get_shape())

    def read(self, name: str, index=...):
        """Returns tensor `name`, or the part that `index` (a slice, or a tuple of slices) selects, in the file's dtype.

        Only that part is read. Raises CheckpointError if there is no such tensor, or if it cannot be read.
        """
        handle = self._open[self.file(name)]
        try:
            stored = self._stored(name)
            tensor = handle.get_tensor(stored) if index is ... else handle.get_slice(stored)[index]
        except Exception as error:  # the library's error has no narrower base class
            raise CheckpointError(
                f"{self.file(name)}: tensor {name!r} of shape {self.shape(name)} cannot be read at {index}: {error}"
            ) from error
        self.num_bytes_read += tensor.nbytes
        return tensor

    def _stored(self, name: str) -> str:
        return name.removeprefix(self._prefix)

    def _check_layers(self) -> None:
        """Refuse a config.json with more layers or experts than the tensors have. Making thousands of layers would take
        minutes before the first missing tensor was noticed.
        """
        experts = "num_local_experts" if self.config.get("num_experts") is None else "num_experts"
        names, absent = " ".join(self._files), {experts: ABSENT_EXPERTS}
        for key, part in (("num_hidden_layers", "layers"), (experts, "experts")):
            said = self.config.get(key, absent.get(key))
            found = max((int(number) for number in re.findall(rf"\b{part}\.(\d{{1,9}})\.", names)), default=-1) + 1
            if isinstance(said, int) and said > found > 0:
                raise CheckpointError(
                    f"{self.folder / 'config.json'}: {key} is {said}; the tensors are those of {found} {part}. Is a "
                    "file missing?"
                )

    def _check_head(self) -> None:
        """Refuse a tied model whose head is stored as well, with other numbers. transformers computes with the head
        then, so config.json is wrong.
        """
        names = ("model.embed_tokens.weight", "lm_head.weight")
        if self.config.get("tie_word_embeddings") is not True or not self._files.keys() >= {*names}:
            return
        table, head = (self._open[self.file(name)].get_slice(self._stored(name)) for name in names)
        rows = (table.get_shape() or [0])[0]
        parts = (slice(first, first + 4096) for first in range(0, rows, 4096))
        if table.get_shape() != head.get_shape() or not all((table[part] == head[part]).all() for part in parts):
            raise CheckpointError(
                f"{self.folder / 'config.json'}: tie_word_embeddings is True, but {self.file(names[1]).name} has "
                f"{names[1]!r} with other numbers than {names[0]!r}. Which one counts? If the head, write false."
            )

    def _find_tensors(self) -> dict[str, Path]:
        single, index = self.folder / "model.safetensors", self.folder / "model.safetensors.index.json"
        if single.is_file():
            return dict.fromkeys(self._names_in(single), single)
        if index.is_file():
            return self._find_shards(index)
        others = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if others:
            raise CheckpointError(
                f"{self.folder} holds {', '.join(others[:4])}, but neither model.safetensors nor "
                "model.safetensors.index.json. Rename a single file to model.safetensors, or add the index."
            )
        pickles = sorted(path.name for suffix in ("bin", "pt", "pth") for path in self.folder.glob(f"*.{suffix}"))
        if pickles:
            raise CheckpointError(
                f"{self.folder} holds {', '.join(pickles[:4])}, but no safetensors. Those are pickles, which can run "
                "code when they are opened: never here. Take the model's safetensors, or, where you trust the file, "
                "convert it with torch.load(path, weights_only=True) and safetensors.torch.save_file."
            )
        raise CheckpointError(f"{self.folder} holds no model.safetensors. Was the download interrupted?")

    def _find_shards(self, index: Path) -> dict[str, Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: has no 'weight_map' from tensor names to files.")
        files: dict[str, Path] = {}
        for name, file in weight_map.items():
            # The index is not trusted: it must not name files in other folders.
            if not isinstance(file, str) or not re.fullmatch(r"[^/\\:]+\.safetensors", file):
                raise CheckpointError(
                    f"{index}: tensor {name!r} is said to be in {file!r:.80}; that must be the plain name of a "
                    ".safetensors file in the same folder."
                )
            files[name] = self.folder / file
        held: dict[str, Path] = {}
        for shard in sorted(set(files.values())):
            if not shard.is_file():
                name = min(name for name, file in files.items() if file == shard)
                raise CheckpointError(
                    f"{shard} is missing; {index.name} says that it holds {name!r}. Download that file too."
                )
            for name in self._names_in(shard):
                if name in held:
                    raise CheckpointError(
                        f"tensor {name!r} is in two files, {held[name]} and {shard.name}: which one counts? Remove "
                        "the file that does not belong to this checkpoint, or download both again."
                    )
                held[name] = shard
        for name, file in files.items():
            if held.get(name) != file:
                raise CheckpointError(
                    f"{file} has no tensor {name!r}, though {index.name} says so. Index and file are from different "
                    "checkpoints: download both again."
                )
        return files

    def _names_in(self, file: Path) -> list[str]:
        from safetensors import safe_open

        try:
            self._open[file] = safe_open(file, framework="pt")
            names = list(self._open[file].keys())
        except Exception as error:  # as above
            problem = _what_is_wrong(file) or f"{error}"[:200]
            raise CheckpointError(f"{file}: {problem}. Download it again.") from error
        for name in names:
            if not name.isprintable():
                raise CheckpointError(f"{file}: {name!r:.80} is no name of a tensor. Download it again.")
            dtype = self._open[file].get_slice(name).get_dtype()
            if name.endswith((".weight", ".bias")) and dtype not in FLOATS and "quantization_config" not in self.config:
                raise CheckpointError(
                    f"{file}: tensor {name!r} is stored as {dtype}; a weight is one of {', '.join(FLOATS)}. Take the "
                    "unquantized checkpoint."
                )
        return names


def _what_is_wrong(file: Path) -> str | None:
    """The reason why a safetensors file cannot be opened: the library says only 'MetadataIncompleteBuffer'."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            return f"cut short: only {size} bytes"
        (header_size,) = struct.unpack("<Q", start)
        if header_size > size - 8:
            return (
                f"cut short or no safetensors file: its header should have {header_size:,} bytes, the file has {size:,}"
            )
        try:
            header = json.loads(stream.read(header_size))
            ends = {name: int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError):
            return "corrupt: its header is not what safetensors write"
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        if 8 + header_size + end > size:
            return f"cut short: tensor {name!r} ends at byte {8 + header_size + end:,}, the file has {size:,}"
    return None
