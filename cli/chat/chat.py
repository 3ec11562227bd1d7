"""`qvl chat`: one question with `-p` or from a pipe, else a conversation."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from qvl.cli import options
from qvl.cli.chat.attachments import attach
from qvl.cli.output import Output

Images = Annotated[
    list[str] | None,
    typer.Option("--image", metavar="FILE", help="A picture to talk about; can be repeated."),
]
Videos = Annotated[
    list[str] | None, typer.Option("--video", metavar="FILE|DIR", help="A video, or a folder of frames.")
]
Prompt = Annotated[
    str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="Ask this and leave; - reads stdin.")
]
Fps = Annotated[
    float | None, typer.Option("--fps", metavar="X", min=0.01, help="Frames of a video a second. Default: 2.")
]
NumberImages = Annotated[
    bool, options.flag("--number-images", help='Put "Picture 1:" before the first picture, and so on.')
]
SchemaFile = Annotated[
    Path | None, typer.Option("--schema", metavar="FILE", help="Answer in JSON that fits this JSON schema.")
]
DrawTo = Annotated[
    Path | None, typer.Option("--draw", metavar="FILE", help="Draw the boxes of the reply onto the picture.")
]
NoCache = Annotated[bool, options.flag("--no-cache", help="Do not keep what is seen in pictures on disk.")]
Continue = Annotated[bool, options.flag("--continue", help="Go on with the last conversation.")]


@options.grouped
def chat(
    *,
    image: Images = None,
    video: Videos = None,
    prompt: Prompt = None,
    fps: Fps = None,
    number_images: NumberImages = False,
    system: options.System = None,
    schema: SchemaFile = None,
    draw: DrawTo = None,
    continue_: Continue = False,
    no_cache: NoCache = False,
    model: options.ModelOptions,
    image_detail: options.ImageDetail = None,
    sampling: options.SamplingOptions,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Talk about pictures and videos.

    One question with -p, or from a pipe; else a conversation.
    """
    from qvl.cli.chat import drawing, sessions
    from qvl.cli.chat.conversation import Conversation
    from qvl.cli.chat.detail import Looking, looked_at_whole
    from qvl.cli.chat.repl import Repl
    from qvl.cli.engine import open_model
    from qvl.runtime.grammar.schema import read_schema

    out = Output(quiet, verbose)
    question = _question(prompt)
    attachments = [*(attach(image, "image") if image else ()), *(attach(video, "video") if video else ())]
    if draw:
        drawing.check_target(draw)
    saved = sessions.load(sessions.LAST) if continue_ else None
    grammar = read_schema(schema) if schema else None
    detail = image_detail or (None if model.min_pixels or model.max_pixels else "auto")
    ahead = partial(looked_at_whole, attachments, detail) if attachments else None
    with open_model(model, out, use_cache=not no_cache, ahead=ahead) as loaded:
        conversation = Conversation(
            loaded, sampling, system, grammar, number_images=number_images, on_drop=partial(_say_dropped, out)
        )
        looking = Looking(loaded, detail, out, fps)
        repl = Repl(conversation, out, looking, as_json=json)
        if saved:
            repl.restore(saved, sampling)
            conversation.set_system(system or saved.system)
        if question is None:
            if attachments:
                repl.attach(attachments)
            return repl.run()
        repl.attach(attachments, look_ahead=False)
        try:
            repl.ask(question)
            if draw:
                repl.draw(draw)
        finally:
            conversation.close()
        is_cut = conversation.reply is not None and conversation.reply.finish_reason == "length"
        return 1 if grammar is not None and is_cut else 0


def _say_dropped(out: Output, n_messages: int) -> None:
    out.note(f"(the context is full: the oldest {n_messages} messages are no longer read)")


def _question(prompt: str | None) -> str | None:
    """The one question to answer, or None for a conversation."""
    if prompt is None and sys.stdin.isatty():
        return None
    text = sys.stdin.read() if prompt in (None, "-") else prompt
    assert text is not None
    if not text.strip():
        missing = "no question is given, and stdin is empty and no terminal"
        empty = missing if prompt is None else "the prompt is empty"
        raise typer.BadParameter(empty, param_hint="-p")
    return text.rstrip("\r\n")
