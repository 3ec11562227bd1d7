"""`qvl chat`: one question with `-p` or from a pipe, else a conversation."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from qvl.cli import options
from qvl.cli.output import Output

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[PICTURE…] [QUESTION]", help="Pictures and videos, and what to ask about them."),
]
Images = Annotated[
    list[str] | None,
    typer.Option("--image", metavar="FILE", help="A picture to talk about, - for stdin; can be repeated."),
]
Videos = Annotated[
    list[str] | None, typer.Option("--video", metavar="FILE|DIR", help="A video, or a folder of frames.")
]
Prompt = Annotated[
    str | None,
    typer.Option("-p", "--prompt", metavar="TEXT", help="Ask this and exit; - reads stdin."),
]
Fps = Annotated[
    float | None, typer.Option("--fps", metavar="X", min=0.01, help="Frames of a video a second. Default: 2.")
]
NumberImages = Annotated[
    bool, options.flag("--number-images", help='Put "Picture 1:" before the first picture, and so on.')
]
Schema = Annotated[
    str | None,
    typer.Option("--schema", metavar="FILE|JSON", help="Answer in JSON that fits this JSON schema."),
]
DrawTo = Annotated[
    Path | None, typer.Option("--draw", metavar="FILE", help="Draw the boxes of the reply onto the picture.")
]
Force = Annotated[bool, options.flag("--force", help="Let --draw overwrite an existing file.")]
NoCache = Annotated[bool, options.flag("--no-cache", help="Do not keep encoded pictures on disk.")]
Continue = Annotated[bool, options.flag("--continue", help="Continue the last conversation.")]


@options.grouped
def chat(
    words: Words = None,
    *,
    image: Images = None,
    video: Videos = None,
    prompt: Prompt = None,
    fps: Fps = None,
    number_images: NumberImages = False,
    system: options.System = None,
    schema: Schema = None,
    draw: DrawTo = None,
    force: Force = False,
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

    One question with -p, as an argument, or from a pipe; else a conversation. Text on stdin beside a question
    is added before it.
    """
    from qvl.cli.chat import drawing, sessions
    from qvl.cli.chat.asked import gather
    from qvl.cli.chat.conversation import Conversation
    from qvl.cli.chat.detail import DetailPolicy, kept_whole
    from qvl.cli.chat.repl import Repl
    from qvl.cli.engine import open_model
    from qvl.cli.inputs import read_schema_option, refuse_stdout

    out = Output(quiet, verbose)
    asked = gather(words or [], image or [], video or [], prompt, out)
    attachments, question = asked.attachments, asked.question
    inputs = [a.path for a in attachments]
    refuse_stdout(inputs)
    if draw:
        if attachments and all(a.kind == "video" for a in attachments):
            raise typer.BadParameter(
                "boxes can be drawn onto pictures only; this is a video", param_hint="--draw"
            )
        drawing.check_target(draw, inputs=inputs, force=force)
    saved = sessions.load(sessions.LAST) if continue_ else None
    grammar = read_schema_option(schema)
    detail = image_detail or (None if model.min_pixels or model.max_pixels else "auto")
    ahead = partial(kept_whole, attachments, detail) if attachments else None
    with open_model(model, out, use_cache=not no_cache, ahead=ahead) as loaded:
        conversation = Conversation(
            loaded, sampling, system, grammar, number_images=number_images, on_drop=partial(_say_dropped, out)
        )
        repl = Repl(conversation, out, DetailPolicy(loaded, detail, fps), as_json=json, draw_to=draw)
        if saved:
            repl.restore(saved, sampling)
            conversation.set_system(saved.system if system is None else system)
        if question is None:
            if attachments:
                repl.attach(attachments)
            return repl.run()
        repl.attach(attachments, look_ahead=False)
        try:
            repl.ask(question)
            if draw and not conversation.boxes_by_picture():
                out.warn(f"{draw}: not written, since the reply has no boxes")
        finally:
            conversation.close()
        is_cut = conversation.reply is not None and conversation.reply.finish_reason == "length"
        return 1 if grammar is not None and is_cut else 0


def _say_dropped(out: Output, n_messages: int) -> None:
    out.note(f"(the context is full: the oldest {n_messages} messages were dropped)")
