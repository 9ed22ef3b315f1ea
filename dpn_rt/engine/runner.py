"""Computes one step: a part of a prefill, or one new row for each running sequence."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpn_rt.backends.backend import Backend, Decoded, SequenceCache
from dpn_rt.engine.images import ImageRows
from dpn_rt.engine.prefill import Prefill
from dpn_rt.engine.prefix_cache import PrefixCache
from dpn_rt.engine.scheduler import Batch
from dpn_rt.engine.sequence import Sequence


class Runner:
    """A backend, images' rows and cached prefixes; and the prefill in flight, if there is one."""

    def __init__(self, backend: Backend, images: ImageRows, prefix_cache: PrefixCache | None = None) -> None:
        """`prefix_cache`: None: prompts' prefixes are not kept."""
        self.backend, self.images, self.prefix_cache = backend, images, prefix_cache
        self._prefill: Prefill | None = None

    @property
    def cache(self) -> SequenceCache:
        """Where keys and values are, as far as scheduling is concerned."""
        return self.backend.cache

    def prefill(self, batch: Batch, max_work: int | None) -> Tensor | None:
        """New sequences, to be given again until they are done.

        Args:
            batch: the sequences.
            max_work: rows times layers of the part that is computed now; None: all of it.

        Returns:
            Logits `[num_seqs, vocab_size]`; None while a part is left.
        """
        prefill = self._prefill = self._prefill or Prefill(batch, self.backend, self.images, self.prefix_cache)
        prefill.advance(max_work)
        while prefill.logits is None and max_work is None:
            prefill.advance()
        if prefill.logits is not None:
            self._prefill = None
        return prefill.logits

    def leave_prefill(self, sequence: Sequence) -> None:
        """Goes on without a sequence that has ended, if it is being prefilled."""
        if self._prefill is not None and sequence in self._prefill.sequences:
            self._prefill.drop(sequence)
            if not self._prefill.sequences:
                self._prefill = None

    def abandon_prefill(self) -> None:
        """Forgets a prefill that has failed."""
        self._prefill = None

    def decode(self, batch: Batch, token_ids: Tensor | None = None) -> Decoded:
        """Logits after each sequence's last token, whose room in the cache has been made.

        Args:
            batch: the sequences.
            token_ids: `[num_seqs]` int64, those tokens where only the backend's device has them yet.
        """
        ids: npt.NDArray[np.int64] | Tensor
        if token_ids is None:
            ids = np.asarray([sequence.output_token_ids[-1] for sequence in batch.sequences], dtype=np.int64)
        else:
            ids = token_ids
        with torch.inference_mode():
            return self.backend.decode(ids, batch.slots)

    def close(self) -> None:
        """See `Backend.close`."""
        self.backend.close()

    def reuse_statistics(self) -> tuple[int, int, int, int, int]:
        """Rows of prompts and those of them found in the cache; images of prompts and those that skipped the tower;
        prefixes that gave way to others."""
        prefixes, images = self.prefix_cache, self.images.cache
        if prefixes is None or images is None:
            return 0, 0, 0, 0, 0
        prefix = prefixes.statistics
        hits = prefix.image_hits + images.hits
        return prefix.queried_rows, prefix.hit_rows, prefix.image_queries, hits, prefix.evictions
