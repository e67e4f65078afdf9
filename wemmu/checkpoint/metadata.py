"""Reads a checkpoint's index without running code in it.

DCP's index, `.metadata`, is a pickle, which can call any function. A checkpoint from elsewhere may do so, with matching
hashes. torch reads the values themselves with `weights_only`.
"""

import pickle
from enum import Enum, EnumType
from typing import Any

from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

# The classes in an index of tensors; each only holds values.
_PARTS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"},
    "pathlib": {"PosixPath"},
}


def _member(kind: Any, name: str) -> Enum:
    """Return the member of an enumeration, and no other attribute of anything."""
    if not (isinstance(kind, EnumType) and isinstance(name, str) and name in kind.__members__):
        raise pickle.UnpicklingError(f"its .metadata asks {kind!r} for {name!r}, which does not belong in an index")
    return kind[name]


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            # So Python 3.11.0 to 3.11.3, which Debian 12 has, names the members of enumerations.
            return _member
        if name not in _PARTS.get(module, ()):
            raise pickle.UnpicklingError(f"its .metadata names {module}.{name}, which does not belong in an index")
        return super().find_class(module, name)


class CheckedReader(FileSystemReader):
    """A reader of tensors: refuses other classes in the index, runs none of its code, and knows no other values."""

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raise pickle.UnpicklingError naming what has no place in it."""
        if self._index is None:
            with self.fs.create_stream(self.fs.concat_path(self.path, ".metadata"), "rb") as file:
                _Index(file).load()
            self._index = super().read_metadata(*args, **kwargs)
            # Other values are pickles, which torch would load with all that they name.
            self._index.state_dict_metadata = {
                name: found
                for name, found in self._index.state_dict_metadata.items()
                if isinstance(found, TensorStorageMetadata)
            }
        return self._index
