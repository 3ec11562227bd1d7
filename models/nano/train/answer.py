"""A question with its true reply, and what each part of the reply is about."""

from __future__ import annotations

THINGS = 16  # at most that many in a picture
Ref = tuple[int, int, int]  # start and end in the reply's characters, frame * THINGS + index of the thing
SINK = 1 << THINGS  # in a group: "and the first token, twice", so that what it gets tells how many there are


class Answer(tuple[str, str]):
    """(question, reply). `refs` name the thing that each span of the reply tells of, where there is one."""

    refs: tuple[Ref, ...]
    groups: tuple[Ref, ...]  # start, end, bits of things of the first frame that the span tells of together

    def __new__(
        cls, question: str, reply: str, refs: tuple[Ref, ...] = (), groups: tuple[Ref, ...] = ()
    ) -> Answer:
        self = super().__new__(cls, (question, reply))
        self.refs, self.groups = refs, groups
        return self

    @classmethod
    def about(cls, question: str, reply: str, thing: int) -> Answer:
        """The whole reply is about one thing."""
        return cls(question, reply, ((0, len(reply), thing),))

    @classmethod
    def parts(cls, question: str, parts: list[tuple[str, int]]) -> Answer:
        """A reply put together from (text, thing); a thing of -1 is none."""
        text, refs = "", []
        for part, thing in parts:
            if thing >= 0:
                refs.append((len(text), len(text) + len(part), thing))
            text += part
        return cls(question, text, tuple(refs))

    @classmethod
    def number(cls, question: str, things: list[int]) -> Answer:
        """Number of these."""
        reply = str(len(things))
        return cls(question, reply, groups=((0, len(reply), SINK | sum(1 << t for t in things)),))
