"""Text from a stream of token ids: whole characters only, and in the end the same text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"  # what decoders put in place of bytes that are not (yet) a character
_LONGEST = 256  # tokens decoded again with each piece before the oldest are let go
_CONTEXT = 64


class Detokenizer:
    """Decodes ids as they come.

    A token may be a part of a character, and its text may depend on the tokens before it
    (a leading space, for example). So each call decodes a window of the latest tokens, and gives
    the text that is new; what ends in an unfinished character waits for the tokens that follow.

    Args:
      decode: from token ids to text.
      context: ids before the stream, such as the prompt's; their text is not given again.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()):
        self._decode = decode
        self._window: list[int] = list(context)
        self._given = 0  # characters of the window's text that were given, or are not to be
        self._shorten()

    def push(self, ids: Sequence[int]) -> str:
        """The new text that these ids complete, which may be empty."""
        self._window += ids
        text = self._decode(self._window)
        whole = text.rstrip(_UNFINISHED)
        piece = whole[self._given :]
        self._given = max(self._given, len(whole))
        if len(self._window) > _LONGEST and whole == text:
            self._shorten()
        return piece

    def _shorten(self) -> None:
        """Keeps the newest tokens, all of whose text counts as given."""
        self._window = self._window[-_CONTEXT:]
        # The cut may have gone through a character, of four bytes at most; some decoders would
        # then take all that follows for broken.
        for _ in range(3):
            if not self._decode(self._window).startswith(_UNFINISHED):
                break
            del self._window[0]
        self._given = len(self._decode(self._window))

    def flush(self) -> str:
        """What still waits, unfinished characters replaced. To be called once, at the end."""
        text = self._decode(self._window)
        piece, self._given = text[self._given :], len(text)
        return piece
