"""Generated ids -> text, as they come, with stop strings.

Text is held back for three reasons. A character of which some bytes are missing decodes to U+FFFD. A run of
byte-fallback tokens is decoded as a whole, so a later byte can still change it. And text that may be the beginning of a
stop string must not be streamed until later tokens have shown that it is not.
"""

from __future__ import annotations

from dpn_rt.outputs import FinishReason
from dpn_rt.prompts.tokenizer import Tokenizer
from dpn_rt.sampling.params import SamplingParams

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_WINDOW = 16
"""Number of ids that are decoded again with each new one. A few are needed as context; more only cost time."""


class Detokenizer:
    """The text of one completion. The results of `take`, joined, are the decoding of all ids up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._skip_special = params.skip_special_tokens
        self._stops = params.stop_strings
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._window: list[int] = []
        self._mark = 0
        """Number of ids in the window when all its text was last settled; a later window can start after them."""
        self._settled = 0
        """Number of characters of the decoded window that can no longer change; they are in `_text`."""
        self._text = ""
        self._tail = ""
        """Text after `_text` that has been decoded but may still change."""
        self._num_tokens = 0
        self._sent = 0
        """Number of characters that `take` has given."""
        self._floor = 0
        """Length of the text at `min_tokens`. Only stop strings that end after it count."""
        self._finished = False

    @property
    def text(self) -> str:
        """All text so far, without a stop string and the text after it."""
        return self._text + self._tail

    def add(self, token_id: int, finish_reason: FinishReason | None) -> tuple[str, str | None]:
        """Takes one sampled id.

        Args:
            token_id: where `finish_reason` is "stop" it is a stop token, which has no text unless
                `include_stop_str_in_output` is set.
            finish_reason: why the completion ends with this id; None while it goes on.

        Returns:
            The text that became certain, and the stop string that the id completed, if any.
        """
        stop = None
        if finish_reason != "stop" or self._include_stop:
            stop = self.append(token_id)
        if finish_reason is not None or stop is not None:
            self.finish()
        return self.take(), stop

    def append(self, token_id: int) -> str | None:
        """Takes one id. Returns the stop string that it completed, or None. No id may follow a stop string."""
        before = len(self._text)
        self._num_tokens += 1
        if self._tokenizer.has_text(token_id, self._skip_special):
            self._decode(token_id)
        if not self._stops:
            return None
        if self._num_tokens <= self._min_tokens:
            self._floor = len(self.text)
            return None
        return self._find_stop(max(before, self._floor))

    def take(self) -> str:
        """The text that has become certain since the last call."""
        end = len(self._text) if self._finished else len(self._text) - self._num_held()
        delta = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return delta

    def finish(self) -> None:
        """To be called after the last id: the text that was held back becomes certain."""
        self._text += self._tail
        self._tail = ""
        self._finished = True

    def _decode(self, token_id: int) -> None:
        self._window.append(token_id)
        decoded = self._tokenizer.decode(self._window, self._skip_special)
        settled = self._settled
        if token_id not in self._tokenizer.byte_ids:
            settled = max(settled, len(decoded.rstrip(_REPLACEMENT)))
        self._text += decoded[self._settled : settled]
        self._tail = decoded[settled:]
        self._settled = settled
        if not self._tail and token_id not in self._tokenizer.byte_ids:
            self._move_window()

    def _move_window(self) -> None:
        """Drops the ids before the mark once the window is long.

        The ids after it stay as context, since a tokenizer may drop the space of the first token that it decodes.
        """
        if len(self._window) > _WINDOW:
            kept = self._window[self._mark :]
            decoded = self._tokenizer.decode(kept, self._skip_special)
            if decoded:
                self._window, self._settled = kept, len(decoded)
        self._mark = len(self._window)

    def _find_stop(self, known: int) -> str | None:
        """The first stop string in the text that ends after the first `known` characters; the text is cut there."""
        text = self.text
        matches = [(text.find(stop, max(0, known - len(stop) + 1)), stop) for stop in self._stops]
        found = [match for match in matches if match[0] >= 0]
        if not found:
            return None
        position, stop = min(found, key=lambda match: match[0])
        self._text = text[: position + (len(stop) if self._include_stop else 0)]
        self._tail = ""
        self._finished = True
        return stop

    def _num_held(self) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop string."""
        unsent = len(self._text) - self._sent
        for length in range(min(unsent, max(map(len, self._stops), default=0)), 0, -1):
            end = self._text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
