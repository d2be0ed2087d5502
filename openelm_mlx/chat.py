"""Chats: `Conversation`, and `encode_messages`, which makes tokens of one in the Instruct format.

>>> from openelm_mlx.chat import Conversation, encode_messages
"""

from openelm_mlx.engine.conversation import Conversation
from openelm_mlx.engine.prompts import encode_messages

__all__ = ["Conversation", "encode_messages"]
