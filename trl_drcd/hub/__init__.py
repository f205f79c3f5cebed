"""Upload models, evaluation samples and collections to the Hugging Face Hub, through huggingface_hub's client."""

from trl_drcd.hub.collections import add_to_collection
from trl_drcd.hub.push import push_to_hub
from trl_drcd.hub.selection import files_to_push

__all__ = ["add_to_collection", "files_to_push", "push_to_hub"]
