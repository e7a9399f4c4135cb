"""Keys and values with room for those to come, so that a token is written and not all before it copied."""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

# tokens that memory is enlarged by: a quarter of what there is, so that all copies together are a few of the whole
_LEAST_ROOM = 32


class RoomyLayer(DynamicLayer):
    """A ``DynamicLayer`` whose keys and values are the beginning of larger tensors: [rows, heads, tokens, width]."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._memory: dict[str, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values of new tokens and return those of all.

        Args:
            key_states: [rows, heads, new tokens, width].
            value_states: Likewise, of its own width.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        self.keys = self._extended("keys", self.keys, key_states, length)
        self.values = self._extended("values", self.values, value_states, length)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in their order, as often as they are named.

        Args:
            indices: [kept] int64.
        """
        super().batch_select_indices(indices)
        self._memory.clear()

    def _extended(self, name: str, held: Tensor, new: Tensor, length: int) -> Tensor:
        end, memory = length + new.shape[-2], self._memory.get(name)
        if memory is None or memory.shape[-2] < end:
            # zeros, since a weight of 0 leaves out what has no token yet
            memory = new.new_zeros(*new.shape[:-2], end + max(_LEAST_ROOM, end // 4), new.shape[-1])
            if length:
                memory[..., :length, :] = held
            self._memory[name] = memory
        memory[..., length:end, :] = new
        return memory[..., :end, :]


def make_cache(config: PretrainedConfig) -> DynamicCache:
    """Return an empty cache for a model, whose layers without a window have room.

    Args:
        config: The model's.
    """
    cache = DynamicCache(config=config)
    # a window drops its oldest token with each new one, and layers of other kinds hold more than these two
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
