"""Finds the checkpoint folder that a model's name stands for, and reads its tensors."""

from common.checkpoints.folder import Checkpoint, CheckpointError, read_json
from common.checkpoints.names import MODELS, cache_folder, cached, find_checkpoint
from common.checkpoints.schema import check_config
