"""Reading a checkpoint's index without running what it says.

DCP keeps its index, `.metadata`, as a pickle, and a pickle can name any function to be called. A checkpoint that came
from elsewhere may have been made to do so, its hashes with it. The values themselves are read by torch with
`weights_only`.
"""

import pickle
from typing import Any

from torch.distributed.checkpoint import FileSystemReader, Metadata

# All that an index of tensors is made of; each only holds values.
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
    "torch": {"Size", "float32", "float16", "bfloat16", "int64"},
    "pathlib": {"PosixPath"},
}


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _PARTS.get(module, ()):
            raise pickle.UnpicklingError(f"its .metadata names {module}.{name}, which has no place in an index")
        return super().find_class(module, name)


class CheckedReader(FileSystemReader):
    """Refuses an index that names anything but parts of an index; nothing of it is run. Reads it once."""

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises pickle.UnpicklingError naming what has no place in it."""
        if self._index is None:
            with self.fs.create_stream(self.fs.concat_path(self.path, ".metadata"), "rb") as file:
                _Index(file).load()
            self._index = super().read_metadata(*args, **kwargs)
        return self._index
