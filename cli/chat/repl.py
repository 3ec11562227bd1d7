"""The conversation on a terminal: reads a line, carries it out, until the user exits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from qvl.cli.chat import commands, drawing, sessions
from qvl.cli.chat.attachments import (
    DOWNLOAD,
    Attachment,
    extract,
    is_address,
    lone_path,
    looks_like_path,
    shown,
    unmet,
)
from qvl.cli.chat.conversation import Conversation
from qvl.cli.chat.detail import DetailPolicy
from qvl.cli.chat.line_editor import LineReader
from qvl.cli.chat.report import reply_json, stats_text
from qvl.cli.options import SamplingOptions
from qvl.cli.output import Output, one_line
from qvl.runtime.errors import ImageError, InputError, OutputError, QvlError
from qvl.runtime.vision.kind import kind_of

PROMPT: Final = ">>> "
_BAR_AFTER: Final = 0.5
_LONG: Final = 10_000  # characters; reading them takes longer than that


class Repl:
    """A conversation driven by typed lines.

    Args:
        draw_to: the file that the boxes of each reply are drawn into; it may be overwritten.
    """

    def __init__(
        self,
        conversation: Conversation,
        out: Output,
        detail: DetailPolicy | None = None,
        *,
        as_json: bool = False,
        draw_to: Path | None = None,
    ) -> None:
        self.conversation: Conversation = conversation
        self.out = out
        self.detail = detail or DetailPolicy(conversation.model, None)
        self.as_json = as_json
        self.draw_to = draw_to
        self.reader = LineReader({name: self._choices(name) for name in commands.COMMANDS})

    def _choices(self, name: str) -> Callable[[], list[str]] | None:
        choices = commands.COMMANDS[name].choices
        return None if choices is None else lambda: choices(self)

    def run(self) -> int:
        """Read and answer until the user exits; returns the exit code."""
        self.out.dim("/help lists the commands; drop a picture here to talk about it; Ctrl-D exits")
        try:
            while True:
                try:
                    line = self.reader.read(self._prompt())
                except EOFError:
                    self.out.note()
                    return 0
                except KeyboardInterrupt:
                    self.out.note("" if self.reader.typed else "\n(Ctrl-D or /exit ends the conversation)")
                    continue
                try:
                    self.handle(line)
                except commands.Leave:
                    return 0
                except KeyboardInterrupt:
                    self.out.note("\n(stopped)")
                except QvlError as e:
                    self.out.error(e)
                    if self.conversation.pending:
                        self.out.dim("attached pictures are kept; /detach removes them")
                except BrokenPipeError:  # nobody reads the replies
                    raise
                except OSError as e:  # a file's; a conversation outlives it
                    self.out.error(f"{e.filename or 'input or output'}: {e.strerror or e}")
        finally:
            self.reader.close()
            self.conversation.close()

    def _prompt(self) -> str:
        pending = self.conversation.pending
        names = ", ".join(one_line(a.path.name) for a in pending)
        if len(names) > (self.out.width or 80) // 2:
            names = f"{len(pending)} attached"
        return f"[{names}] {PROMPT}" if names else PROMPT

    def handle(self, line: str) -> None:
        """Carry out a message or a command.

        Raises:
            InputError: a command that is refused, or a message about a picture that cannot be attached: it is
                not sent, and what was attached before stays.
        """
        if not line.strip():
            return
        if line.strip().lower() in ("exit", "quit"):  # as in `llm chat` and most shells
            raise commands.Leave
        lines = [part for part in line.splitlines() if part.strip()]
        if all(part.startswith("/") and not looks_like_path(part) for part in lines):
            for part in lines:  # several where they were pasted
                commands.run(self, part)
            return
        text, found = extract(line)
        if not found:
            self._refuse_what_is_no_picture(line)
        self._refuse_what_is_not_there(text, found, as_it_is=line[0] == " ")
        if found:
            self.attach(found)
        if text:
            self.ask(text)

    def _refuse_what_is_no_picture(self, line: str) -> None:
        """A path alone that is no picture, as when a file of another kind is dropped."""
        word = line.split(maxsplit=1)[0]
        if kind_of(Path(word)) and line.startswith("/"):
            hint = "/image PATH attaches a picture; Tab completes paths"
            raise ImageError(f"{word}: no such file", hint=hint)
        if path := lone_path(line.strip()):
            what = "a folder" if path.is_dir() else "not a picture or video, judging by its name"
            hint = "/video attaches a folder of frames, /image any file that holds a picture"
            raise InputError(f"{shown(path)}: {what}", hint=hint)

    def _refuse_what_is_not_there(self, text: str, found: list[Attachment], *, as_it_is: bool) -> None:
        """Names of pictures in a message for which there is no file, and which were not attached before."""
        seen = [*self.conversation.media, *(a.path for a in (*self.conversation.pending, *found))]
        for name in unmet(text, {path.name for path in seen}):
            what = "a web address; qvl does not download" if is_address(name) else "no such file"
            if as_it_is:
                self.out.warn(f"{name}: {what}; the model gets only its name")
                continue
            self.reader.offer(text if not found else "")
            how = DOWNLOAD if is_address(name) else "Tab completes names"
            raise ImageError(
                f"{name}: {what}; not sent", hint=f"{how}; to send it anyway, begin it with a space"
            )

    def attach(self, attachments: list[Attachment], *, look_ahead: bool = True) -> None:
        """Attach to the next message, and say so.

        Args:
            look_ahead: begin to encode at once; without it, only shrunk pictures are mentioned.
        """
        bounded = [self.detail.bounded(a) for a in attachments]
        said = [
            f"attached {shown(a.path)} {self.detail.describe(a)}".rstrip()
            for a in bounded
            if look_ahead or self.detail.is_shrunk(a)
        ]
        if self.out.verbose:
            said += [self.detail.table(a.path, self.out.note_width) for a in bounded if a.kind == "image"]
        self.conversation.attach(bounded, look_ahead=look_ahead)
        for line in said:
            self.out.dim(line)

    def ask(self, text: str) -> None:
        """Stream the reply to stdout and keep the conversation for `--continue`.

        Ctrl-C goes through, when what was said until then has been finished off.
        """
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        replied = False
        try:
            delay = 0.0 if len(text) > _LONG else _BAR_AFTER
            with self.out.progress("reading", "%", delay=delay) as bar:
                for piece in self.conversation.ask(text, lambda *at: bar(at[1], 1.0, self._stage(*at))):
                    replied = True
                    bar.close()
                    if not self.as_json:
                        self.out.write(piece)
            replied = True
        finally:
            if replied:
                self._finish_reply()

    def _finish_reply(self) -> None:
        if self.as_json:
            self.out.json(reply_json(self.conversation))
        else:
            self.out.line()
            self._say_if_cut()
        if boxed := self.conversation.boxes_by_picture():
            pictures = self.conversation.pictures
            if self.draw_to is not None:
                self.draw(self.draw_to, force=True)
            if len(pictures) > 1:
                names = ", ".join(f"picture {n} ({pictures[n - 1].name})" for n in boxed)
                self.out.dim(f'(boxes in {names}; a question can name another: "in picture 1")')
        for problem in self.conversation.problems:
            self.out.warn(problem)
        if self.out.verbose:
            self.show_stats()
        try:
            sessions.save(sessions.LAST, self.conversation.saved())
        except OutputError as e:  # no home to write to: only --continue needs it
            self.out.detail(e.message)

    def _say_if_cut(self) -> None:
        reply = self.conversation.reply
        if reply is None or reply.finish_reason != "length":
            return
        n = reply.usage.completion_tokens
        if self.conversation.schema is not None:
            self.out.warn(f"cut off after {n} tokens: the JSON is not whole; -n makes room for more")
        else:
            self.out.dim(f"(cut off after {n} tokens; -n, or /set max_tokens, makes room for more)")

    def _stage(self, stage: str, share: float) -> str:
        """Label of a stage for the progress bar."""
        if stage != "encode":
            return "reading the frames" if stage == "frames" else "reading"
        n_layer = self.conversation.model.vision.config.n_layer
        return f"encoding, layer {min(n_layer, round(share * n_layer) + 1)} of {n_layer}"

    def restore(self, saved: sessions.Saved, given: SamplingOptions | None = None) -> None:
        """Continue a saved conversation; shows its last reply as readable text."""
        self.conversation.restore(saved, given)
        turns = sum(m["role"] == "user" for m in saved.messages)
        self.out.dim(f"{turns} question{'s' if turns != 1 else ''} so far")
        if self.conversation.messages:
            last = self.conversation.messages[-1]
            text = last.get("shown", last["content"])
            if isinstance(text, str):
                self.out.note(text)

    def draw(self, path: Path | None, *, force: bool = False) -> None:
        """Draw the boxes of the last reply onto their picture; without a path, into the working folder.

        Boxes in several pictures make several files, numbered as the pictures are.

        Args:
            force: overwrite a file of this name without asking.

        Raises:
            InputError: there are no boxes, or no picture. OutputError: it cannot be written there.
        """
        from qvl.runtime.grounding.draw import draw

        boxed = self.conversation.boxes_by_picture()
        if not boxed:
            raise InputError(
                "the last reply has no boxes to draw",
                hint='ask for them: "Find the cat." or "Where is the red circle?"',
            )
        for number, boxes in boxed.items():
            picture = self.conversation.pictures[number - 1]
            target = path or drawing.unused(Path(f"{picture.stem}-boxes.png"))
            if len(boxed) > 1 and path is not None:
                target = target.with_stem(f"{target.stem}-{number}")
            inputs = self.conversation.media
            try:
                drawing.check_target(target, inputs=inputs, force=force)
            except drawing.Exists:
                if not self.reader.confirms(f"{target} exists; overwrite it? [y/N] "):
                    raise
            drawing.write(draw(picture, boxes), target, inputs=inputs, force=True)
            self.out.dim(f"boxes drawn into {target}")

    def show_stats(self) -> None:
        """Print what the last reply cost. Raises InputError without one."""
        if self.conversation.reply is None:
            since = " since the conversation was loaded" if self.conversation.messages else " yet"
            raise InputError(f"no reply{since}", hint="ask something first")
        self.out.answer(stats_text(self.conversation))
