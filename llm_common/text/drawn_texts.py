"""Texts while their ids are drawn, a chunk at a time: where each of them ends."""

from collections.abc import Callable, Iterable, Sequence

from llm_common.errors import UserError


class DrawnTexts:
    """The new ids of n texts.

    A text ends before an id in eos_ids, or once `finished(row, its ids)` says so. why_not_finite: says of a row and its
    ids, for people, why its logits are not finite.
    """

    def __init__(
        self,
        n: int,
        eos_ids: tuple[int, ...],
        finished: Callable[[int, list[int]], bool] | None,
        why_not_finite: Callable[[int, list[int]], str],
    ) -> None:
        self.texts: list[list[int]] = [[] for _ in range(n)]
        self._ended = [False] * n
        self._eos_ids, self._finished, self._why_not_finite = eos_ids, finished, why_not_finite

    def add(self, drawn: Sequence[Sequence[int]]) -> list[list[int]]:
        """What a chunk of ids, one row for each text, adds to every text.

        Raises UserError for a negative id, which stands for logits that are not finite, in a text that has not ended.
        """
        new: list[list[int]] = [[] for _ in self.texts]
        for row, ids in enumerate(drawn):
            for token in ids:
                if token < 0 and not self._ended[row]:
                    raise UserError(self._why_not_finite(row, self.texts[row]))
                self._ended[row] = self._ended[row] or token in self._eos_ids
                if not self._ended[row]:
                    new[row].append(token)
                    self.texts[row].append(token)
                    self._ended[row] = self._finished is not None and self._finished(row, self.texts[row])
        return new

    @property
    def ended(self) -> bool:
        """Whether all texts have."""
        return all(self._ended)


def chunks_ahead(platform: str) -> int:
    """How many more chunks a device is given before the host looks at the last one: an accelerator does not wait. On
    Apple's "mps" torch cannot look at one chunk without waiting for the next.
    """
    return 0 if platform in ("cpu", "mps") else 1


def join(stream: Iterable[list[list[int]]], n: int) -> list[list[int]]:
    """The whole of what a stream adds to n texts."""
    texts: list[list[int]] = [[] for _ in range(n)]
    for new in stream:
        for text, ids in zip(texts, new, strict=True):
            text += ids
    return texts
