"""The state of a chat: messages, what is attached to the next one, settings, and the model's session.

The list of messages is the truth. Undoing, editing and retrying only change it; what the KV cache can
keep of the old prompt is for the session to find out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl.cli.chat.attachments import Attachment
from qvl.cli.chat.background import Background
from qvl.cli.chat.sessions import Saved
from qvl.cli.options import SamplingOptions
from qvl.runtime.errors import InputError
from qvl.runtime.grounding.readable import read_reply
from qvl.runtime.grounding.tags import GroundingParser

if TYPE_CHECKING:
    from qvl.runtime.engine.reply import Reply, StageProgress
    from qvl.runtime.engine.session import Session
    from qvl.runtime.model import Model
    from qvl.runtime.vision.size import PictureInfo

Message = dict[str, Any]


@dataclass
class Conversation:
    """One conversation with one model.

    Attributes:
        messages: finished turns, user and assistant in turns; the system prompt is kept apart.
        pending: attachments of the next message, before its text.
        reply: the last reply, or None.
        on_drop: called with a number of messages when the context is full and the oldest are left out.
        boxes: of the last reply, as in `Reply.boxes`.
        problems: what was wrong with its boxes, in words.
    """

    model: Model
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    system: str | None = None
    schema: dict[str, Any] | None = None
    messages: list[Message] = field(default_factory=list)
    pending: list[Attachment] = field(default_factory=list)
    number_images: bool = False
    reply: Reply | None = None
    on_drop: Callable[[int], None] | None = None
    boxes: list[Mapping[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._session: Session = self.model.session()
        self._session.on_drop = self.on_drop
        self._eager = Background()
        self._n_dropped = 0

    @property
    def n_ctx(self) -> int:
        """Tokens that the context holds."""
        return self._session.n_ctx

    # asking ----------------------------------------------------------------------------------------

    def ask(self, text: str, progress: StageProgress | None = None) -> Iterator[str]:
        """Put a question and stream the reply as readable text.

        If the reader stops half-way (Ctrl-C), the part that was read stays in the conversation. If nothing
        was read, or it fails, the question is removed and its attachments are pending again.
        """
        self._eager.wait(progress)
        parts = [a.part() for a in self.pending]
        content: Any = [*parts, {"type": "text", "text": text}] if parts else text
        attached, self.pending = self.pending, []
        self.messages.append({"role": "user", "content": content})
        self._forget_reply()
        try:
            yield from self._answer(progress)
        finally:
            if self.reply is not None and (self.reply.raw or self.reply.finish_reason != "cancelled"):
                self.messages.append(self._reply_message(self.reply))
            else:
                self.messages.pop()
                self.pending = attached

    def _answer(self, progress: StageProgress | None) -> Iterator[str]:
        stream = self._session.generate(
            self._prompt(),
            schema=self.schema,
            number_images=self.number_images,
            progress=progress,
            **self.sampling.kwargs(),
        )
        try:
            for piece in stream:
                self._n_dropped = stream.dropped_messages
                if piece.text:
                    yield piece.text
        except (KeyboardInterrupt, GeneratorExit):
            stream.cancel()
            self._take(stream.result())
            raise
        self._take(stream.result())

    def _take(self, reply: Reply) -> None:
        self.reply, self.boxes, self.problems = reply, list(reply.boxes), list(reply.problems)

    def _reply_message(self, reply: Reply) -> Message:
        """The text as the model wrote it; with boxes or problems also the readable text and the boxes."""
        message: Message = {"role": "assistant", "content": reply.raw}
        if reply.boxes or reply.problems:
            message |= {"shown": reply.text, "boxes": [self.box_json(box) for box in reply.boxes]}
        return message

    def box_json(self, box: Mapping[str, Any]) -> dict[str, Any]:
        """A box with the path of the picture that it is in."""
        return _with_image(box, self.pictures)

    @property
    def media(self) -> list[Path]:
        """The pictures and videos that the model sees, in order."""
        return [a.path for a in self._seen()]

    @property
    def pictures(self) -> list[Path]:
        """The pictures that the model sees, as they are numbered from 1."""
        return [a.path for a in self._seen() if a.kind == "image"]

    def _seen(self) -> list[Attachment]:
        return [a for m in self.messages[self._n_dropped :] for a in _split(m["content"])[1]]

    def boxes_by_picture(self) -> dict[int, list[Mapping[str, Any]]]:
        """The boxes of the last reply that are in a picture, by its number."""
        found: dict[int, list[Mapping[str, Any]]] = {}
        for box in self.boxes:
            if "picture" in box:
                found.setdefault(box["picture"], []).append(box)
        return found

    def _prompt(self) -> list[Message]:
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, *({"role": m["role"], "content": m["content"]} for m in self.messages)]

    # attaching -------------------------------------------------------------------------------------

    def attach(self, attachments: list[Attachment], *, look_ahead: bool = True) -> None:
        """Attach to the next message, and begin to encode it in the background."""
        self._eager.cancel()
        self.pending += attachments
        if look_ahead:
            self._look_ahead()

    def _look_ahead(self) -> None:
        """Encode and prefill what is attached while the user types: it comes before the question."""
        if not self.pending:
            return
        opening = {"role": "user", "content": [a.part() for a in self.pending]}
        prompt = [*self._prompt(), opening]
        self._eager.start(
            lambda cancel, progress: self._session.prefill(
                prompt, cancel=cancel, number_images=self.number_images, progress=progress
            )
        )

    def detach(self, name: str | None = None) -> list[Attachment]:
        """Drop the attachments of the next message: all of them, or those of this name.

        Raises:
            InputError: nothing is attached, or nothing of this name.
        """
        if not self.pending:
            raise InputError("nothing is attached")
        taken = [a for a in self.pending if name in (None, a.path.name, str(a.path))]
        if not taken:
            names = ", ".join(a.path.name for a in self.pending)
            raise InputError(f"{name} is not attached", hint=f"attached: {names}")
        self._eager.cancel()
        self.pending = [a for a in self.pending if a not in taken]
        self._look_ahead()
        return taken

    # changing what was said ------------------------------------------------------------------------

    def clear(self) -> None:
        """Remove all turns and attachments; the system prompt and the settings are kept."""
        self._eager.cancel()
        self.messages.clear()
        self.pending.clear()
        self._forget_reply()

    def _forget_reply(self) -> None:
        self.reply, self.boxes, self.problems = None, [], []
        self._n_dropped = 0

    def undo(self) -> tuple[str, list[Attachment]]:
        """Remove the last question with its reply; returns its text and its attachments.

        Raises:
            InputError: the conversation is empty.
        """
        if not self.messages:
            raise InputError("the conversation is empty")
        self._eager.cancel()
        self._forget_reply()
        while (message := self.messages.pop())["role"] != "user":
            pass
        return _split(message["content"])

    def take_back(self) -> str:
        """Remove the last question, attach its pictures again, and return its text."""
        text, attached = self.undo()
        self.pending = attached + self.pending
        return text

    def set_system(self, text: str | None) -> None:
        self._eager.cancel()
        self.system = text
        self._look_ahead()

    def set(self, name: str, value: str) -> str:
        """Change a sampling setting; "default" brings back the model's own. Returns the setting's full name.

        Raises:
            InputError: no such setting, or a value it cannot have.
        """
        kinds: dict[str, type] = {"max_tokens": int, "top_k": int, "seed": int}
        names = [f.name for f in fields(SamplingOptions)]
        name = {"temp": "temperature"}.get(name, name).replace("-", "_")
        if name not in names:
            raise InputError(f"no setting is called {name!r}", hint=f"there are: {', '.join(names)}")
        if value == "default":
            self.sampling = replace(self.sampling, **{name: getattr(SamplingOptions(), name)})
            return name
        try:
            number = kinds.get(name, float)(value)
        except ValueError as e:
            raise InputError(
                f"{name} must be a number, not {value!r}", hint=f"/set {name} default resets it"
            ) from e
        if not 0 <= number < math.inf or (name in ("max_tokens", "repeat_penalty") and number <= 0):
            raise InputError(f"{name} cannot be {value}", hint=f"/set {name} default resets it")
        self.sampling = replace(self.sampling, **{name: number})
        return name

    # saving ----------------------------------------------------------------------------------------

    def saved(self) -> Saved:
        messages = [_saved(message) for message in self.messages]
        return Saved(messages, self.system, str(self.model.path), self.sampling.kwargs())

    def restore(self, saved: Saved, given: SamplingOptions | None = None) -> None:
        """Go on with a saved conversation: its messages, system prompt and settings.

        Args:
            given: settings that go before the saved ones where they are not the default.
        """
        self.clear()
        self.messages = [_restored(saved.messages, i) for i in range(len(saved.messages))]
        self.system = saved.system
        known = {f.name for f in fields(SamplingOptions)}
        settings = {k: v for k, v in saved.settings.items() if k in known}
        if given is not None:
            settings |= {k: v for k, v in given.kwargs().items() if v != getattr(SamplingOptions(), k)}
        self.sampling = SamplingOptions(**settings)

    def close(self) -> None:
        self._eager.cancel()


def _saved(message: Message) -> Message:
    """The message with its readable text as `content`, and what the model wrote as `raw`."""
    if "shown" not in message:
        return message
    written, boxes = message["content"], message["boxes"]
    return {"role": message["role"], "content": message["shown"], "raw": written, "boxes": boxes}


def _restored(messages: list[Message], i: int) -> Message:
    """The reverse of `_saved` for the i-th message; files of earlier versions have only the raw text."""
    message = messages[i]
    content = message["content"]
    if isinstance(message.get("raw"), str):
        return {"role": message["role"], "content": message["raw"], "shown": content,
                "boxes": message.get("boxes", [])}  # fmt: skip
    if message["role"] == "assistant" and isinstance(content, str) and "<|box_start|>" in content:
        asked = [_split(m["content"]) for m in messages[:i] if m["role"] == "user"]
        paths = [a.path for _, attached in asked for a in attached if a.kind == "image"]
        reply = read_reply(content, GroundingParser, _infos(paths), asked[-1][0] if asked else "")
        boxes = [_with_image(box, paths) for box in reply.boxes]
        return {**message, "shown": reply.text, "boxes": boxes}
    return message


def _infos(paths: list[Path]) -> list[PictureInfo]:
    """Sizes and names of pictures; nothing where one of them cannot be read any more."""
    from qvl.runtime.vision.size import PictureInfo, size_of

    try:
        return [PictureInfo(size_of(path), size_of(path), path.name) for path in paths]
    except InputError:
        return []


def _with_image(box: Mapping[str, Any], paths: list[Path]) -> dict[str, Any]:
    number = box.get("picture")
    return {**box, **({} if number is None else {"image": str(paths[number - 1])})}


def _split(content: str | list[dict[str, Any]]) -> tuple[str, list[Attachment]]:
    if isinstance(content, str):
        return content, []
    text = "\n".join(part["text"] for part in content if part["type"] == "text")
    return text, [Attachment.of_part(part) for part in content if part["type"] in ("image", "video")]
