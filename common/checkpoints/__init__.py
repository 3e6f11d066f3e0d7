"""A model's name to a checkpoint folder on this machine, and that folder to tensors."""

from common.checkpoints.folder import (
    MODELS,
    Checkpoint,
    CheckpointError,
    cache_folder,
    cached,
    download,
    find_checkpoint,
    progress,
    read_json,
)

__all__ = [
    "MODELS",
    "Checkpoint",
    "CheckpointError",
    "cache_folder",
    "cached",
    "download",
    "find_checkpoint",
    "progress",
    "read_json",
]
