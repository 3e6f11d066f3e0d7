"""A model's name to a checkpoint folder on this machine, and that folder to tensors."""

from common.checkpoints.folder import Checkpoint, CheckpointError, read_json
from common.checkpoints.names import MODELS, cache_folder, cached, find_checkpoint
from common.checkpoints.schema import check_config
