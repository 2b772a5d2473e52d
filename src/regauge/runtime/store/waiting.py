"""What waits until a prompt has been read: nothing of it is sealed before then."""

from __future__ import annotations

from regauge.errors import SettingError
from regauge.runtime.store.packed import Packed


class Waiting:
    """One store's.

    Attributes:
        pending: a prompt is being read.
        expected: tokens that the text will have when it has been read; None: nobody said, so the first call of one new
            token tells.
    """

    def __init__(self) -> None:
        self.pending, self.blind = True, False
        self.expected: int | None = None

    def begin(self, store: Packed) -> None:
        """Of a store with nothing in it: nothing is sealed before the prompt has been read."""
        self.pending, self.expected, self.blind = True, None, False
        store.hold()

    def expect(self, store: Packed, tokens: int) -> None:
        """A prompt is about to be read, after which the text has so many tokens."""
        if tokens > store.length + 1 or not store.length:
            self.pending, self.expected = True, tokens
            store.hold()

    def asking(self) -> None:
        """Keys are about to be returned to whoever attends.

        Raises:
            SettingError: those returned before were attended to without a word.
        """
        if self.blind:
            raise SettingError(
                "this cache lets tokens go, or shares them, by what attends to them, and the model attends by a "
                "function that does not say; leave attn_implementation as rg.load sets it, or budget and merge out of "
                "the cache's recipe"
            )
        self.blind = True

    def over(self, store: Packed, one: bool) -> bool:
        """Whether the prompt has been read.

        Args:
            one: only one token of each sequence was new.
        """
        return one if self.expected is None else store.length >= self.expected
