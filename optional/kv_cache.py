"""Keys and values of a rollout with room for the tokens to come. transformers' own cache copies all of them for each token; a
static one would have every token attend to the greatest length."""

import torch.nn.functional as F
import transformers
from transformers.cache_utils import DynamicLayer

ROOM = 16  # tokens; one copy each time they are used up, and at most so many too many


class RoomyLayer(DynamicLayer):
    """What DynamicLayer holds, in the first columns of larger tensors [B, heads, a multiple of ROOM, head size]."""

    room = ()

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n = self.get_seq_length()
        end = n + key_states.shape[-2]
        if n == 0 or end > self.room[0].shape[-2]:
            old = (self.keys, self.values) if n else (key_states[:, :, :0], value_states[:, :, :0])
            self.room = tuple(F.pad(x, (0, 0, 0, -(-end // ROOM) * ROOM - n)) for x in old)
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, n:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        if self.room:  # a layer that reads another's keys has none
            n, self.room = self.get_seq_length(), tuple(room[indices] for room in self.room)
            self.keys, self.values = (room[:, :, :n] for room in self.room)


def roomy(config):
    """A DynamicCache, its plain layers (not those of a sliding window) with room."""
    cache = transformers.DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
